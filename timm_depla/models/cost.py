"""The cost of networks: multiply-adds, activations and parameters."""

import copy
from typing import Dict, Sequence

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from timm_depla.layers import set_fused_depla

__all__ = ['count_cost', 'count_macs']


def count_cost(model: nn.Module, size: Sequence[int]) -> Dict[str, int]:
    """Cost of a network for one image of this size (C, H, W), with every layer counted.

    Returns:
        `macs`, multiply-adds of convolutions and matrix products; `activations`, output elements of convolutions and
        linear layers; `parameters`.
    """
    model = copy.deepcopy(model).to('meta').eval()
    sizes = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _, __, output: sizes.append(output.numel()))
    macs = count_macs(model, size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return dict(macs=macs, activations=sum(sizes), parameters=parameters)


def count_macs(model: nn.Module, size: Sequence[int]) -> int:
    """Multiply-adds of the convolutions and matrix products that run for one image of this size (C, H, W).

    The model must be on the meta device and in evaluation mode.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), set_fused_depla(False):
        model(torch.empty(1, *size, device='meta'))
    return counter.get_total_flops() // 2
