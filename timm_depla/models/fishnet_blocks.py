"""The parts of FishNet: its residual block, and the stages of tail, bridge, body and head.

Paper: `FishNet: A Versatile Backbone for Image, Region, and Pixel Level Prediction`, Sun et al., NeurIPS 2018 -
https://arxiv.org/abs/1901.03495
"""

from typing import Any, Dict, NamedTuple, Optional, Sequence, Type

import torch
import torch.nn as nn
from timm.layers import DropPath, register_notrace_function
from timm.models import checkpoint_seq
from torch import Tensor

from timm_depla.layers import Depla
from timm_depla.layers.linear import match_size


class Join(NamedTuple):
    """A stage of body or head: widths of its main path and branch, and dilation of the main path."""

    main_in: int
    main_out: int
    branch: int
    dilation: int = 1


@register_notrace_function  # depends on the size
def check_size(x: Tensor) -> None:
    """Raise ValueError unless images x (B, C, H, W) leave at least one position at 1/32."""
    if x.shape[2] < 29 or x.shape[3] < 29:
        raise ValueError(
            f'FishNet needs images of at least 29 x 29 pixels, of which one position is left at 1/32, but got '
            f'{x.shape[2]} x {x.shape[3]}; resize or pad them'
        )


class ChannelSum(nn.Module):
    """Sum every `size` consecutive channels: a shortcut without parameters, for blocks that narrow the main path."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.size)).sum(2, dtype=x.dtype)  # (B, C, H, W) -> (B, C / size, H, W)


def conv_norm(in_chs: int, out_chs: int, norm_layer: Type[nn.Module], stride: int = 1, **dd) -> nn.Sequential:
    """3x3 convolution, norm and activation."""
    conv = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
    return nn.Sequential(conv, norm_layer(out_chs, **dd), nn.ReLU(inplace=True))


def _norm_conv(in_chs: int, out_chs: int, norm_layer: Type[nn.Module], **dd) -> nn.Sequential:
    """Norm, activation and 1x1 convolution."""
    conv = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd)
    return nn.Sequential(norm_layer(in_chs, **dd), nn.ReLU(inplace=True), conv)


def squeeze(in_chs: int, norm_layer: Type[nn.Module], **dd) -> nn.Sequential:
    """Halve the width: norm, activation, 1x1 convolution, norm and activation."""
    conv = _norm_conv(in_chs, in_chs // 2, norm_layer, **dd)
    return conv.extend([norm_layer(in_chs // 2, **dd), nn.ReLU(inplace=True)])


class PreActBottleneck(nn.Module):
    """Residual block: three pre-activated convolutions (1x1, 3x3 and 1x1), added to a shortcut.

    The shortcut is the input itself where the widths agree; else a pre-activated 1x1 convolution or, with
    `sum_shortcut`, a `ChannelSum`.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        norm_layer: Type[nn.Module],
        drop_path: float,
        dilation: int = 1,
        sum_shortcut: bool = False,
        **dd,
    ) -> None:
        super().__init__()
        mid_chs = out_chs // 4
        self.bn1 = norm_layer(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False, **dd)
        self.bn2 = norm_layer(mid_chs, **dd)
        self.conv2 = nn.Conv2d(mid_chs, mid_chs, 3, padding=dilation, dilation=dilation, bias=False, **dd)
        self.bn3 = norm_layer(mid_chs, **dd)
        self.conv3 = nn.Conv2d(mid_chs, out_chs, 1, bias=False, **dd)
        self.act = nn.ReLU(inplace=True)
        if in_chs == out_chs:
            self.shortcut = nn.Identity()
        elif sum_shortcut:
            self.shortcut = ChannelSum(in_chs // out_chs)
        else:
            self.shortcut = _norm_conv(in_chs, out_chs, norm_layer, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.conv1(self.act(self.bn1(x)))
        x = self.conv2(self.act(self.bn2(x)))
        x = self.drop_path(self.conv3(self.act(self.bn3(x))))
        x += shortcut
        return x


class Blocks(nn.Sequential):
    """Residual blocks in a row, one for each rate of stochastic depth."""

    def __init__(self, in_chs: int, out_chs: int, drop_paths: Sequence[float], **kwargs) -> None:
        super().__init__(*[
            PreActBottleneck(out_chs if i else in_chs, out_chs, drop_path=rate, **kwargs)
            for i, rate in enumerate(drop_paths)
        ])  # fmt: skip
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self, x, every=len(self))
        for block in self:
            x = block(x)
        return x


class TailStage(nn.Module):
    """Residual blocks, then max-pooling to half the resolution."""

    def __init__(self, in_chs: int, out_chs: int, drop_paths: Sequence[float], **layers) -> None:
        super().__init__()
        self.blocks = Blocks(in_chs, out_chs, drop_paths, **layers)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.blocks(x))


class Bridge(nn.Module):
    """The stage between tail and body: residual blocks with squeeze-and-excitation, at the lowest resolution."""

    def __init__(
        self, in_chs: int, mid_chs: int, out_chs: int, drop_paths: Sequence[float], norm_layer: Type[nn.Module], **dd
    ) -> None:
        super().__init__()
        self.squeeze = squeeze(in_chs, norm_layer, **dd)
        self.expand = nn.Conv2d(in_chs // 2, mid_chs, 1, **dd)
        self.blocks = Blocks(mid_chs, out_chs, drop_paths, norm_layer=norm_layer, **dd)
        self.attention = nn.Sequential(
            norm_layer(mid_chs, **dd),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(mid_chs, out_chs // 16, 1, **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_chs // 16, out_chs, 1, **dd),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(self.squeeze(x))
        attention = self.attention(x)  # (B, C, 1, 1)
        return self.blocks(x) * attention + attention


class JoinStage(nn.Module):
    """Stage of body or head: refine the main path, resample it and join it with a branch, by DEPLA if `depla` is given.

    Up-sampling and refinement (UR, the body) resizes it to the branch: twice its size, or one more where the
    tail's pooling dropped an odd row or column. Down-sampling and refinement (DR, the head) pools by two.
    """

    def __init__(
        self,
        join: Join,
        width: int,
        down: bool,
        drop_paths: Sequence[float],
        num_branch_blocks: int,
        depla: Optional[Dict[str, Any]],
        norm_layer: Type[nn.Module],
        **dd,
    ) -> None:
        super().__init__()
        main_in, main_out, branch = width * join.main_in, width * join.main_out, width * join.branch
        layers = dict(norm_layer=norm_layer, **dd)
        self.blocks = Blocks(main_in, main_out, drop_paths, dilation=join.dilation, sum_shortcut=True, **layers)
        self.pool = nn.MaxPool2d(2) if down else nn.Identity()
        self.transfer = Blocks(branch, branch, [0.0] * num_branch_blocks, **layers)
        self.depla = None
        if depla is not None:
            drop_path = DropPath(drop_paths[-1]) if drop_paths[-1] else None
            depla = dict(depla, upsample='nearest', drop_path=drop_path)
            if depla.get('keep_candidate') is True:  # the stage keeps it anyway, by concatenation
                depla.update(keep_candidate=False, init_scale=0.0)
            self.depla = Depla(main_out, branch, **depla, **layers)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        x = self.pool(self.blocks(x))
        branch = self.transfer(branch)
        if self.depla is None:
            return torch.cat([match_size(x, branch, 'nearest'), branch], dim=1)
        return torch.cat([self.depla(x, branch), branch], dim=1)
