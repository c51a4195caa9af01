"""The fused form of DEPLA: the same outputs, gradients and running statistics, with fewer and smaller maps."""

import math
import os
from contextlib import ExitStack
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .linear import back_fill, match_size, matmul, soft_roi_pool

_FUSED = {'0': 0, '2': 2}.get(os.environ.get('TIMM_DEPLA_FUSED', '1'), 1)
LARGE = 2**19  # elements of a map from which on fewer of them pay in training on a CPU (benchmark `grid`)


def set_fused_depla(enable: bool = True, always: bool = False) -> ExitStack:
    """Turn the fused form off or on everywhere, or only in a `with` block; `always`: in training, for small maps, too.

    At first, it is as the environment variable TIMM_DEPLA_FUSED says: 0 for off, 1 for on, 2 for always.
    """
    global _FUSED
    before, _FUSED = _FUSED, enable and 1 + always
    (stack := ExitStack()).callback(set_fused_depla, before > 0, before > 1)
    return stack


def use_fused_depla() -> bool:
    """Whether to take the fused form; scripts and exports see the modules."""
    return False if torch.jit.is_scripting() else _FUSED > 0 and not torch.compiler.is_exporting()


def forward(block: nn.Module, identity: Tensor, candidate: Tensor) -> Tensor:
    """Compute block(identity, candidate); as in timm's fused attention, hooks inside the block may not run."""
    values = block.candidate(candidate)
    if block.upsample == 'nearest' and not block.keep_candidate:
        values = pool_repeated(values, identity)
    refinement = aggregate(block, identity, values)
    return match_size(block.combine(identity, candidate, refinement), candidate, block.upsample)


def aggregate(block: nn.Module, identity: Tensor, values: Tensor) -> Tensor:
    """The refinement of X (B, C1, h, w) from Y' (B, D*C, h, w), with the norm folded where that pays."""
    values = match_size(values, identity, block.upsample)
    maps = block.rpn(identity, values)
    vectors, heatmaps = block.bfn(identity, soft_roi_pool(maps, values), maps)
    vectors, norm = block.proj(vectors), block.norm
    can_fold = type(norm) is nn.BatchNorm2d and norm.training and norm.track_running_stats and norm.momentum is not None
    if can_fold and pays(identity, on_gpu=math.inf) and maps[:, 0, 0].numel() > 1:
        return back_fill(*fold_norm(norm, vectors, heatmaps), identity.dtype)
    return norm(back_fill(vectors, heatmaps, block.bias, identity.dtype))


def pays(x: Tensor, on_gpu: float) -> bool:
    """Whether maps as large as x cost more than the operations that save them."""
    launches_cost = x.device.type not in ('cpu', 'meta') and not torch.compiler.is_compiling()  # eager, on a GPU
    return _FUSED > 1 or x.numel() >= (on_gpu if launches_cost else LARGE)


def pool_repeated(x: Tensor, other: Tensor) -> Tensor:
    """Pool x (B, C, H, W), which equals up-sampling the other map where that repeats whole blocks (ruling 12)."""
    rows, columns = x.shape[2] // other.shape[2], x.shape[3] // other.shape[3]
    is_whole = rows * other.shape[2] == x.shape[2] and columns * other.shape[3] == x.shape[3]
    return F.avg_pool2d(x, [rows, columns]) if is_whole and rows * columns > 1 else x


def fold_norm(norm: nn.BatchNorm2d, vectors: Tensor, heatmaps: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Fold the norm into what is back-filled: vectors (B, L, C), heatmaps (B, L, H, W) and a bias (B, 1, C).

    The map's mean is that of the summed vectors. Its variance follows from the Gram matrix of the contrasts N B - 1.
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
