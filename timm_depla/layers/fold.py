"""Faster equivalents: BatchNorm without materialising the map that it normalises, and two convolutions as one.

The statistics of a linear layer's output follow from the mean and covariance of its input. Each function takes the
modules that it replaces. If `can_fold` is False, as when one of them has hooks, call the modules instead.
"""

from typing import Any, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from torch import Tensor

from .linear import Conv1x1, ConvNorm, convolve, matmul

__all__ = [
    'can_fold', 'compose', 'compose_linear', 'fold_into_features', 'has_hooks', 'launches_cost', 'scale_and_level',
]  # fmt: skip

LINEAR = (nn.BatchNorm2d, BatchNormAct2d, nn.Identity, nn.Conv2d, Conv1x1, ConvNorm)  # activations are not linear


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def can_fold(*modules: nn.Module) -> bool:
    """Whether these are 1x1 convolutions without bias and BatchNorms with weights and statistics, all without hooks."""
    parts = [part for module in modules for part in module.modules()]
    if any(type(part) not in LINEAR or has_hooks(part) for part in parts):
        return False
    if any(part.bias is not None or part.kernel_size != (1, 1) for part in parts if isinstance(part, nn.Conv2d)):
        return False
    norms = [part for part in parts if isinstance(part, nn.BatchNorm2d)]
    return all(norm.affine and norm.track_running_stats and norm.momentum is not None for norm in norms)


def launches_cost(x: Tensor) -> bool:
    """Whether an operation takes a while to start, however small: on a GPU, unless a compiler joins it to others."""
    return x.device.type not in ('cpu', 'meta') and not torch.compiler.is_compiling()


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update a norm's running statistics with those of a batch of `count` positions."""
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean.type_as(norm.running_mean), norm.momentum)
    norm.running_var.lerp_((var * (count / (count - 1))).type_as(norm.running_var), norm.momentum)


def scale_and_level(norm: nn.BatchNorm2d) -> Tuple[Tensor, Tensor]:
    """The factor and the summand, of shape (C,), by which a norm in evaluation mode maps each channel."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


def fold_into_features(
    norm: nn.BatchNorm2d, features: Tensor, heatmaps: Tensor
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Fold the norm of a back-filled map into the vectors that fill the map.

    In training, each heatmap is its mean, one, plus its contrast. So the mean of the map is that of the summed vectors,
    and its variance follows from the Gram matrix of the contrasts; the norm's running statistics are updated.

    Takes features (B, L, C) and heatmaps (B, L, N) of mean one. Returns what fills the normalised map: vectors,
    heatmaps, and a vector (1, 1, C) to add everywhere. In training, this is None: the last of L + 1 vectors has a
    heatmap of ones, so that one product has all gradients.
    """
    dtype = features.dtype
    features = features.type_as(norm.weight)
    if not norm.training:
        scale, level = scale_and_level(norm)
        return (features * scale).to(dtype), heatmaps, level.to(dtype).expand(1, 1, -1)
    filling = torch.cat([heatmaps - 1, torch.ones_like(heatmaps[:, :1])], dim=1)
    contrasts = filling[:, :-1].type_as(norm.weight)
    count = contrasts.shape[0] * contrasts.shape[2]
    means = features.sum(1)  # (B, C), over the positions
    between, mean = torch.var_mean(means, 0, correction=0)  # of the images
    gram = matmul(contrasts, contrasts.transpose(1, 2))  # (B, L, L)
    var = torch.add(between, (features * matmul(gram, features)).sum((0, 1)), alpha=1 / count)
    _update(norm, mean, var, count)
    scale = norm.weight * (var + norm.eps).rsqrt()
    level = torch.addcmul(norm.bias, means - mean, scale)  # (B, C)
    return torch.cat([features * scale, level.unsqueeze(1)], dim=1).to(dtype), filling, None


class Moments(torch.autograd.Function):
    """Means (P,) and second moments (P, P) of rows (N, P), in single precision or better.

    PyTorch's own gradient of rows.t() @ rows takes two products as large; its sum with that of the mean, two maps more.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows.mean(0), matmul(rows.t(), rows) / len(rows)

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_moments: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        dtype = rows.dtype
        rows = rows.float() if dtype == torch.float16 else rows  # it has not the range of a gradient over N rows
        weight = (of_moments + of_moments.t()) / len(rows)
        return torch.addmm((of_mean / len(rows)).to(rows.dtype), rows, weight.to(rows.dtype)).to(dtype)


def compose(conv: nn.Conv2d, norm: nn.BatchNorm2d, layer: ConvNorm, x: Tensor) -> Tensor:
    """Compute layer(norm(conv(x))) as one convolution of x (B, P, H, W), without the maps in between.

    In training, the statistics of conv(x) follow from the mean (P,) and covariance (P, P) of x, in single precision or
    better; the norm's running statistics are updated.
    """
    if norm.training and x.numel() <= x.shape[1]:  # no batch, or one position: as BatchNorm answers it
        return layer(norm(conv(x)))
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = conv.weight.flatten(1).to(dtype)  # (C, P)
    mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    if norm.training:
        rows = x.movedim(1, 3).flatten(0, 2)  # (B*N, P)
        means, moments = Moments.apply(rows)
        covariance = moments.addr_(means, means, alpha=-1)  # (P, P); in place, since a GPU's autocast rounds torch.addr
        mean = matmul(weight, means)
        var = (matmul(weight, covariance) * weight).sum(1).clamp(min=0)  # rounding may make it negative
        _update(norm, mean, var, len(rows))
    scale = norm.weight.to(dtype) * (var + norm.eps).rsqrt()
    kernel = layer.conv.weight.flatten(1).to(dtype)
    bias = matmul(kernel, norm.bias.to(dtype) - mean * scale)
    kernel = matmul(kernel * scale, weight).unsqueeze(2).unsqueeze(3)
    return layer.norm(convolve(x, kernel.type_as(x), bias.type_as(x)).type_as(layer.conv.weight))


def compose_linear(conv: nn.Conv2d, layer: ConvNorm, x: Tensor) -> Tensor:
    """Compute layer(conv(x)) as one convolution of x (B, P, H, W), so that autograd need not save conv(x)."""
    kernel = layer.conv.weight.flatten(1)
    bias = None if conv.bias is None else matmul(kernel, conv.bias).type_as(x)
    kernel = matmul(kernel, conv.weight.flatten(1)).unsqueeze(2).unsqueeze(3)
    return layer.norm(convolve(x, kernel.type_as(x), bias).type_as(layer.conv.weight))
