"""Placement of DEPLA in a network's blocks: its positions and its arguments."""

from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, Type

import torch.nn as nn

from timm_depla.layers import Depla, check_depla_args
from timm_depla.schema import is_integer

__all__ = ['create_depla', 'default_positions', 'init_depla', 'split_depla_args']


def default_positions(num_blocks: int) -> Tuple[int, ...]:
    """Indices of the DEPLA blocks in a stage: three, evenly spread, ending with the last (ruling 3).

    The first block changes the resolution and never has DEPLA. In a stage of up to four blocks, all others do.
    """
    if num_blocks <= 4:
        return tuple(range(1, num_blocks))
    return tuple(round((i + 1) * num_blocks / 3) - 1 for i in range(3))


def split_depla_args(
    layers: Sequence[int], depla: Optional[Dict[str, Any]]
) -> Tuple[int, Tuple[int, ...], Dict[str, Any]]:
    """Check a network's `depla` argument and split it into the stage, positions and arguments of `Depla`.

    Args:
        layers: Blocks in each stage.
        depla: `stage`, the one with DEPLA, from 1 (default: 3); `positions`, indices of its blocks with DEPLA (default:
            `default_positions`); `Depla`'s num_groups, pooled_chs, maps_per_group, temperature, bfn and keep_candidate.

    Raises:
        TypeError: If `depla` is no map, or has an unknown key.
        ValueError: If the stage or a position does not exist.
    """
    block_args = check_depla_args(depla, 'stage', 'positions')
    stage, positions = block_args.pop('stage', 3), block_args.pop('positions', None)
    if not is_integer(stage) or stage not in range(1, len(layers) + 1):
        raise ValueError(f'depla stage must be one of 1 to {len(layers)}, got {stage!r}')
    num_blocks = layers[stage - 1]
    positions = default_positions(num_blocks) if positions is None else positions
    found = tuple(positions) if isinstance(positions, Iterable) else ()
    if not found or not all(is_integer(p) and p in range(num_blocks) for p in found):
        raise ValueError(
            f'depla positions must be block indices of stage {stage}, 0 to {num_blocks - 1}, got {positions!r}'
        )
    return stage, tuple(sorted(set(found))), block_args


def create_depla(
    block: nn.Module, chs: int, depla: Dict[str, Any], norm_layer: Type[nn.Module], device=None, dtype=None, **_
) -> Depla:
    """Build the DEPLA of a residual block; the block's stochastic depth moves to DEPLA's refinement."""
    drop_path, block.drop_path = block.drop_path, None
    return Depla(chs, **depla, norm_layer=norm_layer, drop_path=drop_path, device=device, dtype=dtype)


def init_depla(model: nn.Module) -> None:
    """Initialise the DEPLA blocks of a network again, after the network has initialised all layers (ruling 11)."""
    for module in model.modules():
        if isinstance(module, Depla):
            module.init_weights()
