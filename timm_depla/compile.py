"""Compile the blocks with DEPLA alone: seconds instead of minutes, and the rest of a network may change its sizes."""

from typing import Any

import torch
import torch.nn as nn

from .layers import Depla
from .models.resnet_depla import BottleneckDepla

__all__ = ['compile_blocks']


def compile_blocks(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Compile each block with DEPLA in place, with `nn.Module.compile`; names and state dict stay as they are.

    A block is a `Depla`, or the bottleneck of a ResNet around it, since the fused form reaches out of `Depla`. Blocks
    of the same shape share a graph. By default the first other size of an image makes a second graph, for all sizes;
    `dynamic=True` makes one for all from the start.

    Args:
        model: Any network or detector.
        **kwargs: Arguments of `torch.compile`; `fullgraph` is True by default.

    Returns:
        The model.

    Raises:
        ValueError: If it has no DEPLA.
    """
    blocks = [module for module in model.modules() if isinstance(module, BottleneckDepla)]
    inside = {part for block in blocks for part in block.modules()}
    blocks += [module for module in model.modules() if isinstance(module, Depla) and module not in inside]
    if not blocks:
        raise ValueError(f'{type(model).__name__} has no block with DEPLA to compile')
    shapes = {tuple(value.shape for value in block.state_dict().values()) for block in blocks}
    config = torch._dynamo.config  # one limit for all blocks: of each shape, some graphs for training and inference
    config.recompile_limit = max(config.recompile_limit, 8 * len(shapes))
    for block in blocks:
        block.compile(**{'fullgraph': True, **kwargs})
    return model
