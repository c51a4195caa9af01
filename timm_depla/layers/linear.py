"""Linear operations of the block: matrix products, linear layers, and 1x1 convolutions with norm."""

from typing import Optional, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ['Conv1x1', 'ConvNorm', 'Linear', 'convolve', 'is_autocast', 'matmul']


def is_autocast(x: Tensor) -> bool:
    """Whether autocast applies to operations on x."""
    device = x.device.type  # torch 2.8 cannot compile the question whether it has autocast
    is_known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return is_known and torch.is_autocast_enabled(device)


def matmul(a: Tensor, b: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """a @ b, plus a bias to batches of matrices, in the precision of the operands, also under autocast (ruling 9)."""
    if not torch.jit.is_scripting():
        if is_autocast(a):
            with torch.autocast(a.device.type, enabled=False):
                return a @ b if bias is None else torch.baddbmm(bias, a, b)
    return a @ b if bias is None else torch.baddbmm(bias, a, b)


class Linear(nn.Linear):
    """Linear layer in the precision of its parameters, also under autocast: its inputs are small (ruling 9)."""

    def forward(self, x: Tensor) -> Tensor:
        x = matmul(x, self.weight.t())
        return x if self.bias is None else x + self.bias


def convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Convolve x (B, C, H, W) with a 1x1 weight (K, C, 1, 1) to (B, K, H, W) in the memory format of x.

    On a CPU, a matrix product is faster than a convolution that changes the format (benchmark `block`).
    """
    is_slow = x.device.type == 'cpu' and not x.is_contiguous(memory_format=torch.channels_last)
    if not is_slow or torch.compiler.is_compiling():
        return F.conv2d(x, weight, bias)
    out = torch.bmm(weight.flatten(1).expand(x.shape[0], -1, -1), x.flatten(2))  # torch.matmul would copy x
    return (out if bias is None else out + bias.unsqueeze(1)).unflatten(2, x.shape[2:])


class Conv1x1(nn.Conv2d):
    """1x1 convolution by `convolve`."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias)


class ConvNorm(nn.Module):
    """1x1 convolution without bias, then norm (rulings 5, 8). Autocast applies to the convolution only (ruling 9)."""

    def __init__(self, in_chs: int, out_chs: int, norm_layer: Type[nn.Module] = nn.BatchNorm2d, **dd) -> None:
        super().__init__()
        self.conv = Conv1x1(in_chs, out_chs, 1, bias=False, **dd)
        self.norm = norm_layer(out_chs, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).type_as(self.conv.weight))

    def reparameterize(self) -> None:
        """Fuse convolution and norm for inference; timm's `reparameterize_model` calls this."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()
