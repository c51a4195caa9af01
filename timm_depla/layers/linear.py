"""The block's operations on maps. They keep the memory format, and, but for convolutions, the precision of their input.

A change of format is slow, and PyTorch's BatchNorm on a CPU misreads the gradient of one image with unusual strides.
"""

from functools import wraps
from typing import Any, Callable, List, Optional, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ['ConvNorm', 'Linear', 'back_fill', 'larger_size', 'matmul', 'mix', 'resize', 'soft_roi_pool', 'softmax']


def keep_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute a function of a tensor in the precision of its arguments, also under autocast (ruling 9)."""

    @wraps(function)  # TorchScript compiles what is wrapped
    def call(x: Tensor, *args: Any) -> Tensor:
        device = x.device.type  # torch 2.8 cannot compile the question whether it has autocast
        if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return function(x, *args)
        return function(x, *args)

    return call


@keep_precision
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@keep_precision
def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """Linear layer in the precision of its parameters, also under autocast: its inputs are small (ruling 9)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ConvNorm(nn.Module):
    """1x1 convolution without bias, then norm (rulings 5, 8). Autocast applies to the convolution only (ruling 9)."""

    def __init__(self, in_chs: int, out_chs: int, norm_layer: Type[nn.Module] = nn.BatchNorm2d, **dd) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd)
        self.norm = norm_layer(out_chs, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).type_as(self.conv.weight))

    def reparameterize(self) -> None:
        """Fuse convolution and norm for inference; timm's `reparameterize_model` calls this."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


def larger_size(x: Tensor, y: Tensor) -> List[int]:
    """The larger of two maps' heights, and of their widths."""
    return [max(x.shape[2], y.shape[2]), max(x.shape[3], y.shape[3])]


@register_notrace_function
def resize(x: Tensor, size: List[int], mode: str) -> Tensor:
    """Up-sample x (B, C, h, w) to a size (H, W), in its type: a GPU's autocast would give a map of float32."""
    if x.shape[2] == size[0] and x.shape[3] == size[1]:
        return x
    return F.interpolate(x, size=size, mode=mode).type_as(x)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def rows(x: Tensor) -> Tensor:
    """The positions of x (B, C, H, W) as rows (B, N, C), a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the positions of each channel of x (B, K, H, W)."""
    if is_channels_last(x):
        return rows(x).softmax(1).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return x.flatten(2).softmax(2).unflatten(2, x.shape[2:])


def mix(x: Tensor, weights: Tensor) -> Tensor:
    """1x1 convolution of x (B, P, H, W) with a matrix (B, K, P) for each image, to (B, K, H, W)."""
    if is_channels_last(x):
        return matmul(rows(x), weights.transpose(1, 2)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return matmul(weights, x.flatten(2)).unflatten(2, x.shape[2:])


def soft_roi_pool(maps: Tensor, values: Tensor) -> Tensor:
    """Soft ROI pooling, Z[l, c] = sum over d and n of M[l, d, n] * Y'[c, d, n].

    Takes ROI maps M (B, L, D, H, W), probabilities over the positions, and Y' (B, D*C, H, W); returns Z (B, L, C).
    """
    values, depth = values.type_as(maps), maps.shape[2]
    if is_channels_last(values):
        values = rows(values).unflatten(2, (depth, -1)).flatten(1, 2)  # (B, N*D, C)
        return matmul(maps.permute(0, 1, 3, 4, 2).flatten(2), values)
    values = values.flatten(2).unflatten(1, (depth, -1))  # (B, D, C, N)
    return matmul(maps.transpose(1, 2).flatten(3), values.transpose(2, 3)).sum(1)


def back_fill(vectors: Tensor, heatmaps: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Back-filling, F[c, n] = sum over l of vectors[l, c] * N * B[l, n] (ruling 4(a)), plus bias[c] if there is one.

    Takes vectors (B, L, C1), heatmaps B (B, L, H, W) and a bias (B or 1, 1, C1); returns F (B, C1, H, W).
    """
    filling = heatmaps * (heatmaps.shape[2] * heatmaps.shape[3])
    if bias is not None:  # the vector of a map of ones
        vectors = torch.cat([vectors, bias.type_as(vectors).expand(vectors.shape[0], -1, -1)], dim=1)
        filling = F.pad(filling, [0, 0, 0, 0, 0, 1], value=1.0)
    return mix(filling, vectors.transpose(1, 2))
