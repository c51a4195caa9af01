"""A candidate that is the norm of a 1x1 convolution: not computed in training, and fused for inference."""

from typing import Any, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_depla.layers import Depla, fused
from timm_depla.layers.linear import ConvNorm, matmul

__all__ = ['fuse_candidate', 'is_linear', 'refine']

LINEAR = (nn.BatchNorm2d, BatchNormAct2d, nn.Identity, nn.Conv2d, ConvNorm)  # activations are not linear
LARGE_ON_GPU = 2**24  # elements of a candidate that a GPU writes in the time that some ten operations take to start


def is_linear(conv: nn.Module, norm: nn.Module, depla: Depla) -> bool:
    """Whether only DEPLA's 1x1 convolution reads the candidate norm(conv(x)), a BatchNorm of a 1x1 convolution."""
    parts = [part for module in (conv, norm, depla.candidate) for part in module.modules()]
    convs = [part for part in parts if isinstance(part, nn.Conv2d)]
    norms = [part for part in parts if isinstance(part, nn.BatchNorm2d)]
    return (
        not depla.keep_candidate
        and len(convs) == len(norms) == 2
        and all(type(part) in LINEAR for part in parts)
        and all(conv.kernel_size == (1, 1) and conv.bias is None for conv in convs)
        and all(norm.affine and norm.track_running_stats and norm.momentum is not None for norm in norms)
    )


def refine(depla: Depla, identity: Tensor, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Compute depla(identity, norm(conv(x))); in training, without the candidate where that pays and no hook reads it.

    This takes the covariance of x's channels, which pays if the convolution at least doubles the width.
    """
    if not norm.training or not fused.pays(identity, LARGE_ON_GPU):
        return depla(identity, norm(conv(x)))
    layers = (depla, conv, norm, *depla.candidate.modules())
    hooks = [(m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks) for m in layers]
    if any(map(any, hooks)) or not is_linear(conv, norm, depla) or 2 * conv.in_channels > conv.out_channels:
        return depla(identity, norm(conv(x)))
    values = fuse_in_training(conv, norm, depla.candidate, x)
    return identity + depla.drop_path(fused.aggregate(depla, identity, values).type_as(identity))


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


def fuse_in_training(conv: nn.Conv2d, norm: nn.BatchNorm2d, layer: ConvNorm, x: Tensor) -> Tensor:
    """Compute layer(norm(conv(x))) in training as one convolution of x (B, P, H, W), without the maps in between.

    The norm's statistics follow from the mean (P,) and covariance (P, P) of x, in single precision or better.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, kernel = conv.weight.flatten(1).to(dtype), layer.conv.weight.flatten(1).to(dtype)  # (C2, P), (D*C, C2)
    rows = x.movedim(1, 3).flatten(0, 2)  # (B*N, P)
    means, moments = Moments.apply(rows)
    covariance = moments.addr_(means, means, alpha=-1)  # (P, P); in place, since a GPU's autocast rounds torch.addr
    mean = matmul(weight, means)
    var = (matmul(weight, covariance) * weight).sum(1).clamp(min=0)  # rounding may make it negative
    fused.update_statistics(norm, mean, var, len(rows))
    scale = norm.weight.to(dtype) * (var + norm.eps).rsqrt()
    bias = matmul(kernel, norm.bias.to(dtype) - mean * scale)
    kernel = matmul(kernel * scale, weight).unsqueeze(2).unsqueeze(3)
    return layer.norm(F.conv2d(x, kernel.type_as(x), bias.type_as(x)).type_as(layer.conv.weight))


@torch.no_grad()
def fuse_candidate(conv: nn.Conv2d, norm: nn.BatchNorm2d, depla: Depla) -> None:
    """Fuse conv and norm into DEPLA's candidate layer for inference; it then reads conv's input (if `is_linear`)."""
    fused_conv, kernel = fuse_conv_bn_eval(conv, norm), depla.candidate.conv.weight.flatten(1)
    weight, bias = kernel @ fused_conv.weight.flatten(1), kernel @ fused_conv.bias
    fused_conv.weight.data, fused_conv.bias.data, fused_conv.out_channels = weight[:, :, None, None], bias, len(bias)
    depla.candidate.conv = fused_conv
    depla.candidate_chs = conv.in_channels
