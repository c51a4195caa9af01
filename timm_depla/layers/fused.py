"""The fused form of DEPLA: the same outputs, gradients and running statistics, with fewer and smaller maps.

As in timm's fused attention, hooks inside a fused block may stay silent; those on it always hear X, Y and the output.
"""

import os
from contextlib import ExitStack
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .linear import back_fill, match_size, matmul, soft_roi_pool

_FUSED = os.environ.get('TIMM_DEPLA_FUSED', '1') != '0'


def set_fused_depla(enable: bool = True) -> ExitStack:
    """Turn the fused form on or off everywhere, or only in a `with` block; TIMM_DEPLA_FUSED=0 turns it off at first."""
    global _FUSED
    before, _FUSED = _FUSED, enable
    (stack := ExitStack()).callback(set_fused_depla, before)
    return stack


def use_fused_depla() -> bool:
    """Whether to take the fused form; scripts and exports see the modules."""
    return False if torch.jit.is_scripting() else _FUSED and not torch.compiler.is_exporting()


def forward(block: nn.Module, identity: Tensor, candidate: Tensor) -> Tensor:
    """Compute block(identity, candidate)."""
    values = block.candidate(candidate)
    if block.upsample == 'nearest' and not block.keep_candidate:
        values = pool_repeated(values, identity)
    refined = block.combine(identity, candidate, aggregate(block, identity, values))
    return match_size(refined, candidate, block.upsample)


def aggregate(block: nn.Module, identity: Tensor, values: Tensor) -> Tensor:
    """The refinement of X (B, C1, h, w) from Y' (B, D*C, h, w), whose norm, except on a GPU, is that of `fold_norm`."""
    values = match_size(values, identity, block.upsample)
    maps = block.rpn(identity, values)
    vectors, heatmaps = block.bfn(identity, soft_roi_pool(maps, values), maps)
    vectors, norm = block.proj(vectors), block.norm
    can_fold = type(norm) is nn.BatchNorm2d and norm.training and norm.track_running_stats and norm.momentum is not None
    if can_fold and not launches_cost(vectors) and maps[:, 0, 0].numel() > 1:  # else as BatchNorm answers it
        vectors, heatmaps, bias = fold_norm(norm, vectors, heatmaps)
        return back_fill(vectors, heatmaps, identity.dtype, bias)
    return norm(back_fill(vectors, heatmaps, identity.dtype, block.bias))


def launches_cost(x: Tensor) -> bool:
    """Whether an operation takes a while to start, however small: on a GPU, unless a compiler joins it to others."""
    return x.device.type not in ('cpu', 'meta') and not torch.compiler.is_compiling()


def pool_repeated(x: Tensor, other: Tensor) -> Tensor:
    """Average x (B, C, H, W) where nearest up-sampling would repeat a position of the other map (ruling 12)."""
    rows, columns = x.shape[2] // other.shape[2], x.shape[3] // other.shape[3]
    is_whole = rows * other.shape[2] == x.shape[2] and columns * other.shape[3] == x.shape[3]
    return F.avg_pool2d(x, [rows, columns]) if is_whole and rows * columns > 1 else x


def fold_norm(norm: nn.BatchNorm2d, vectors: Tensor, heatmaps: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """What fills the map that the norm would return: vectors (B, L, C), heatmaps (B, L, H, W), and a bias (B, 1, C).

    N times a heatmap is one, plus its contrast: the mean of the map is that of the summed vectors, and its variance
    follows from the Gram matrix of the contrasts.
    """
    dtype, size = vectors.dtype, heatmaps.shape[2:].numel()
    vectors, count = vectors.type_as(norm.weight), len(heatmaps) * size
    heatmaps = heatmaps - 1 / size
    contrasts = heatmaps.flatten(2).type_as(norm.weight) * size  # (B, L, N)
    means = vectors.sum(1, keepdim=True)  # (B, 1, C), over the positions
    between, mean = torch.var_mean(means, (0, 1), correction=0)  # of the images
    gram = matmul(contrasts, contrasts.transpose(1, 2))  # (B, L, L)
    var = torch.add(between, (vectors * matmul(gram, vectors)).sum((0, 1)), alpha=1 / count)
    update_statistics(norm, mean, var, count)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return (vectors * scale).to(dtype), heatmaps, torch.addcmul(norm.bias, means - mean, scale)


@torch.no_grad()
def update_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update a norm's running statistics with those of a batch of `count` positions."""
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean.type_as(norm.running_mean), norm.momentum)
    norm.running_var.lerp_((var * (count / (count - 1))).type_as(norm.running_var), norm.momentum)
