"""The linear maps that the block is made of: matrix products and 1x1 convolutions."""

from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ['Conv1x1', 'Linear', 'convolve', 'matmul']


@torch.fx.wrap
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of its operands, also under autocast (ruling 9)."""
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript skips only what stands below this line)
        if torch.amp.is_autocast_available(a.device.type):
            with torch.autocast(a.device.type, enabled=False):
                return a @ b
    return a @ b


class Linear(nn.Linear):
    """Linear layer in the precision of its parameters, also under autocast: its inputs are small (ruling 9)."""

    def forward(self, x: Tensor) -> Tensor:
        x = matmul(x, self.weight.t())
        return x if self.bias is None else x + self.bias


@torch.fx.wrap
def convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """The 1x1 convolution of x (B, C, H, W) by a weight (K, C), as (B, K, H, W) in the memory format of x.

    On a CPU, a matrix product takes less time than a convolution that has to change the format (benchmark `block`).
    """
    if x.device.type != 'cpu' or x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight.unsqueeze(2).unsqueeze(3), bias)
    out = torch.bmm(weight.expand(x.shape[0], -1, -1), x.flatten(2))  # torch.matmul would copy x
    return (out if bias is None else out + bias.unsqueeze(1)).unflatten(2, x.shape[2:])


class Conv1x1(nn.Conv2d):
    """1x1 convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int, **dd) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight.flatten(1))
