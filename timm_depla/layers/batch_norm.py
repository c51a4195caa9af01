"""BatchNorm without the map that it normalises: its statistics follow from the tensors that the map is made of."""

from typing import Tuple, Type

import torch
import torch.nn as nn
from torch import Tensor

from .linear import Conv1x1, matmul

__all__ = ['can_fold', 'fold_into_conv', 'fold_into_features', 'is_plain']


def is_plain(module: nn.Module, *types: Type[nn.Module]) -> bool:
    """Whether a module is of one of these very types and has no hooks, so that nobody misses a call of it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) in types and not any(hooks)


def can_fold(norm: nn.Module, *convs: nn.Module) -> bool:
    """Whether a norm is a plain BatchNorm with weights and running statistics, and the others plain convolutions."""
    return (
        is_plain(norm, nn.BatchNorm2d)
        and (norm.affine and norm.track_running_stats and norm.momentum is not None)
        and all(is_plain(conv, nn.Conv2d, Conv1x1) for conv in convs)
    )


def _update(
    running_mean: Tensor, running_var: Tensor, tracked: Tensor, momentum: float, mean: Tensor, var: Tensor, count: int
) -> None:
    """Move running statistics towards those of a batch with this number of positions, as BatchNorm does."""
    if count == 1:
        raise ValueError('batch statistics need more than one position in training, got one image of size 1 x 1')
    with torch.no_grad():
        tracked += 1
        running_mean.lerp_(mean.type_as(running_mean), momentum)
        running_var.lerp_((var * (count / (count - 1))).type_as(running_var), momentum)


def fold_into_features(norm: nn.BatchNorm2d, features: Tensor, contrast: Tensor) -> Tensor:
    """Move the norm of a back-filled map into the vectors that it is filled from.

    A heatmap is one, its mean over the positions, plus its contrast. So the mean of the map is that of the summed
    vectors, and its variance follows from the products of the contrasts with each other. In training the running
    statistics are updated.

    Args:
        norm: For which `can_fold`.
        features: (B, L, C).
        contrast: (B, L, N).

    Returns:
        (B, L + 1, C): vectors for the contrasts, and one for all positions alike.
    """
    return _fold_into_features(
        features, contrast, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked,
        norm.momentum, norm.eps, norm.training,
    )  # fmt: skip


@torch.fx.wrap
def _fold_into_features(
    features: Tensor,
    contrast: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor,
    momentum: float,
    eps: float,
    training: bool,
) -> Tensor:
    dtype = features.dtype
    features, contrast = features.type_as(weight), contrast.type_as(weight)
    mean, var = running_mean, running_var
    means = features.sum(1)  # (B, C), over the positions
    if training:
        mean = means.mean(0)
        gram = matmul(contrast, contrast.transpose(1, 2)) / contrast.shape[2]  # (B, L, L)
        var = (features * matmul(gram, features)).sum(1).mean(0) + (means - mean).square().mean(0)
        _update(running_mean, running_var, tracked, momentum, mean, var, contrast.shape[0] * contrast.shape[2])
    scale = weight * (var + eps).rsqrt()
    level = bias + (means - mean) * scale  # (B, C)
    return torch.cat([features * scale, level.unsqueeze(1)], dim=1).to(dtype)


def fold_into_conv(norm: nn.BatchNorm2d, conv: nn.Conv2d, x: Tensor) -> Tuple[Tensor, Tensor]:
    """Weight (C, P) and bias (C) with norm(conv(x)) = weight @ x + bias, from x (B, P, H, W) and a 1x1 convolution.

    In training the mean and variance of the convolved map follow from those of x and its products over channels, which
    are P * P numbers; the running statistics are updated. Both come in single precision or better.
    """
    return _fold_into_conv(
        x, conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked,
        norm.momentum, norm.eps, norm.training,
    )  # fmt: skip


@torch.fx.wrap
def _fold_into_conv(
    x: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor,
    momentum: float,
    eps: float,
    training: bool,
) -> Tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel = kernel.flatten(1).to(dtype)  # (C, P)
    mean, var = running_mean.to(dtype), running_var.to(dtype)
    if training:
        if x.is_contiguous(memory_format=torch.channels_last):
            rows = x.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)  # (B*N, P)
            means, gram = rows.mean(0), matmul(rows.t(), rows) / len(rows)  # (P), (P, P)
        else:
            rows = x.flatten(2).to(dtype)  # (B, P, N)
            means, gram = rows.mean((0, 2)), matmul(rows, rows.transpose(1, 2)).mean(0) / rows.shape[2]
        mean = matmul(kernel, means)
        covariance = gram - means.outer(means)
        var = (matmul(kernel, covariance) * kernel).sum(1).clamp(min=0)  # rounding may leave less
        _update(running_mean, running_var, tracked, momentum, mean, var, x.shape[0] * x.shape[2] * x.shape[3])
    scale = weight.to(dtype) * (var + eps).rsqrt()
    return kernel * scale.unsqueeze(1), bias.to(dtype) - mean * scale
