"""Operations on maps; they keep the memory format: BatchNorm on a CPU misreads a batch of one with unusual strides."""

from contextlib import nullcontext
from functools import wraps
from typing import Any, Callable, Optional, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval


def keep_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a function in the precision of its arguments, also under autocast (ruling 9)."""

    @wraps(function)  # TorchScript compiles what is wrapped
    def call(*args: Any) -> Tensor:
        kind = args[-1].device.type  # torch 2.8 cannot compile the question whether it has autocast
        is_known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if is_known and torch.is_autocast_enabled(kind) else nullcontext():
            return function(*args)

    return call


@keep_precision
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


class Linear(nn.Linear):
    """Linear layer in the precision of its parameters, also under autocast: its inputs are small."""

    @keep_precision
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


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


@register_notrace_function
def match_size(x: Tensor, other: Tensor, mode: str) -> Tensor:
    """Up-sample x (B, C, H, W) to the maximum of its own and the other map's height and width, in its type."""
    height, width = max(x.shape[2], other.shape[2]), max(x.shape[3], other.shape[3])
    if height == x.shape[2] and width == x.shape[3]:
        return x
    return F.interpolate(x, size=[height, width], mode=mode).type_as(x)  # a GPU's autocast would make it float32


def softmax(x: Tensor) -> Tensor:
    """Softmax over the positions of each channel of x (B, K, H, W)."""
    if x.stride(1) == 1:  # channels last; vmap knows strides alone
        return x.permute(0, 2, 3, 1).flatten(1, 2).softmax(1).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return x.flatten(2).softmax(2).unflatten(2, x.shape[2:])


def mix(x: Tensor, weights: Tensor) -> Tensor:
    """1x1 convolution of x (B, P, H, W) with a matrix (B, K, P) for each image, to (B, K, H, W)."""
    if x.stride(1) == 1:  # channels last; vmap knows strides alone
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, P)
        return matmul(rows, weights.transpose(1, 2)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return matmul(weights, x.flatten(2)).unflatten(2, x.shape[2:])


def soft_roi_pool(maps: Tensor, values: Tensor) -> Tensor:
    """Soft ROI pooling, Z[l, c] = sum over d and n of M[l, d, n] * Y'[c, d, n].

    Takes ROI maps M (B, L, D, H, W), probabilities over the positions, and Y' (B, D*C, H, W); returns Z (B, L, C).
    """
    values = values.type_as(maps).unflatten(1, (maps.shape[2], -1)).flatten(3)  # (B, D, C, N)
    return matmul(maps.transpose(1, 2).flatten(3), values.transpose(2, 3)).sum(1)


def back_fill(vectors: Tensor, heatmaps: Tensor, bias: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """Back-filling, F[c, n] = sum over l of vectors[l, c] * N * B[l, n] (ruling 4(a)), plus bias[c] if there is one.

    Takes vectors (B, L, C1), heatmaps B (B, L, H, W), a bias (B or 1, 1, C1), and the type of what F is added to.
    """
    filling = heatmaps * (heatmaps.shape[2] * heatmaps.shape[3])
    if dtype == torch.bfloat16:  # half the memory, and the range of float32, which float16 has not (ruling 9)
        vectors, filling = vectors.to(dtype), filling.to(dtype)
    if bias is not None:  # the vector of a map of ones
        vectors = torch.cat([vectors, bias.type_as(vectors).expand(vectors.shape[0], -1, -1)], dim=1)
        filling = F.pad(filling, [0, 0, 0, 0, 0, 1], value=1.0)
    return mix(filling, vectors.transpose(1, 2))
