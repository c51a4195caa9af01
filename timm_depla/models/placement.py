"""Placement of DEPLA in a network's blocks: its positions, its arguments, and its fusion with the layers before it."""

from typing import Any, Dict, Optional, Sequence, Tuple, Type

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_depla.layers import Depla, check_depla_args
from timm_depla.layers.fold import can_fold, compose, has_hooks, launches_cost

__all__ = ['can_compose', 'create_depla', 'default_positions', 'fuse_candidate', 'refine_composed', 'split_depla_args']

LARGE = 2**24  # elements of a map that a GPU writes in the time that it takes to launch some ten operations


def default_positions(num_blocks: int) -> Tuple[int, ...]:
    """Indices of the DEPLA blocks in a stage: three, evenly spread, ending with the last (ruling 3).

    The first block changes the resolution and never has DEPLA. In a stage of up to four blocks, all others do.
    """
    if num_blocks <= 4:
        return tuple(range(1, num_blocks))
    return tuple(round((i + 1) * num_blocks / 3) - 1 for i in range(3))


def split_depla_args(
    layers: Sequence[int], stage: int = 3, positions: Optional[Sequence[int]] = None, **block_args
) -> Tuple[int, Tuple[int, ...], Dict[str, Any]]:
    """Check a network's `depla` argument and split it into the stage (from 1), positions and arguments of `Depla`.

    `layers` is the number of blocks in each stage.

    Raises:
        TypeError: If there is an unknown key.
        ValueError: If the stage or a position does not exist.
    """
    check_depla_args(block_args, 'stage', 'positions')
    if stage not in range(1, len(layers) + 1):
        raise ValueError(f'depla stage must be one of 1 to {len(layers)}, got {stage!r}')
    num_blocks = layers[stage - 1]
    positions = tuple(default_positions(num_blocks) if positions is None else positions)
    if not positions or any(p not in range(num_blocks) for p in positions):
        raise ValueError(
            f'depla positions must be block indices of stage {stage}, 0 to {num_blocks - 1}, got {positions}'
        )
    return stage, positions, block_args


def create_depla(
    block: nn.Module, chs: int, depla: Dict[str, Any], norm_layer: Type[nn.Module], device=None, dtype=None, **_
) -> Depla:
    """Build the DEPLA of a residual block; the block's stochastic depth moves to DEPLA's refinement."""
    drop_path, block.drop_path = block.drop_path, None
    return Depla(chs, **depla, norm_layer=norm_layer, drop_path=drop_path, device=device, dtype=dtype)


def can_compose(conv: nn.Module, norm: nn.Module, depla: Depla, x: Optional[Tensor] = None) -> bool:
    """Whether only linear layers of DEPLA read the candidate norm(conv(x)), and no module has hooks.

    In training, composing takes the covariance of the convolution's input channels, which is worth it only if the
    convolution at least doubles the width. On a GPU, for which it is many small operations, the candidate of the input
    x (B, P, H, W) must be large (benchmark `speed`); without x, this is not asked.
    """
    if depla.keep_candidate or has_hooks(depla) or not can_fold(conv, norm, depla.candidate):
        return False
    if norm.training and 2 * conv.in_channels > conv.out_channels:
        return False
    return x is None or not launches_cost(x) or x.numel() // conv.in_channels * conv.out_channels >= LARGE


def refine_composed(conv: nn.Conv2d, norm: nn.BatchNorm2d, depla: Depla, identity: Tensor, x: Tensor) -> Tensor:
    """Compute depla(identity, norm(conv(x))) without materialising the candidate; requires `can_compose`."""
    return identity + depla.drop_path(depla.aggregate(identity, compose(conv, norm, depla.candidate, x)))


@torch.no_grad()
def fuse_candidate(conv: nn.Conv2d, norm: nn.BatchNorm2d, depla: Depla) -> None:
    """Fuse conv and norm into DEPLA's candidate layer for inference; it then reads conv's input (if `can_compose`)."""
    fused, kernel = fuse_conv_bn_eval(conv, norm), depla.candidate.conv.weight.flatten(1)
    weight, bias = kernel @ fused.weight.flatten(1), kernel @ fused.bias
    fused.weight.data, fused.bias.data, fused.out_channels = weight[:, :, None, None], bias, len(bias)
    depla.candidate.conv = fused
    depla.candidate_chs = conv.in_channels
