"""Aggregation with Feature Detection (DEPLA): the one implementation of the block.

Paper: `Aggregation with Feature Detection`, Sun et al., ICCV 2021 -
https://openaccess.thecvf.com/content/ICCV2021/html/Sun_Aggregation_With_Feature_Detection_ICCV_2021_paper.html
Where the paper is silent or ambiguous, the code follows a numbered ruling of docs/rulings.md.

Shapes, in the letters used below:
    B: batch, H, W: height and width, N: H * W positions
    C1, C2: channels of the identity X and of the candidate Y, C: pooled channels (the paper's C2')
    L: groups of regions of interest (ROI), D: ROI maps a group
"""

import math
from typing import Any, Dict, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .batch_norm import can_fold, fold_into_features, is_plain
from .linear import Conv1x1, Linear, convolve, matmul

__all__ = ['SoftRPN', 'soft_roi_pool', 'PlainBFN', 'AdaptiveBFN', 'Depla', 'check_depla_args', 'match_size']

torch.fx.wrap('matmul')  # leaves here too, as in their own file
torch.fx.wrap('convolve')

# What the `depla` argument of a network may set in its blocks: the network knows the rest.
DEPLA_ARGS = ('num_groups', 'pooled_chs', 'maps_per_group', 'temperature', 'bfn', 'rescale_maps')


def check_depla_args(depla: Dict[str, Any], *network_args: str) -> None:
    """Raise TypeError if a network's `depla` argument has a key that is neither a block's nor one of the network's."""
    allowed = [*network_args, *DEPLA_ARGS]
    if unknown := sorted(set(depla) - set(allowed)):
        raise TypeError(f'unknown depla argument {unknown}; there are {allowed}')


@torch.fx.wrap  # data-dependent control flow: a leaf for symbolic tracing
def match_size(x: Tensor, other: Tensor, mode: str) -> Tensor:
    """Up-sample x (B, C, H, W) to the larger of its own height and width and the other map's."""
    height, width = max(x.shape[2], other.shape[2]), max(x.shape[3], other.shape[3])
    if height == x.shape[2] and width == x.shape[3]:
        return x
    return F.interpolate(x, size=[height, width], mode=mode)


@torch.fx.wrap
def check_channels(identity: Tensor, identity_chs: int, candidate: Tensor, candidate_chs: int) -> None:
    """Raise ValueError unless both maps have the number of channels that the block was built for."""
    if identity.shape[1] != identity_chs or candidate.shape[1] != candidate_chs:
        raise ValueError(
            f'this Depla was built for {identity_chs} identity and {candidate_chs} candidate channels, but got '
            f'tensors with {identity.shape[1]} and {candidate.shape[1]}; set identity_chs and candidate_chs to match'
        )


@torch.fx.wrap
def compose_conv(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], kernel: Tensor) -> Tensor:
    """The 1x1 convolution by a kernel (K, C, 1, 1) of weight @ x + bias, (B, K, H, W), in one convolution of x."""
    if weight is None or bias is None:  # in a symbolic trace, which does not know yet
        return convolve(x, kernel.flatten(1))
    kernel = kernel.flatten(1).type_as(weight)
    return convolve(x, matmul(kernel, weight).type_as(x), matmul(kernel, bias).type_as(x))


@torch.fx.wrap
def softmax_positions(x: Tensor) -> Tensor:
    """Softmax of logits (B, K, H, W) over the positions, (B, K, N), in their memory format."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.flatten(2).transpose(1, 2).softmax(1).transpose(1, 2)
    return x.flatten(2).softmax(2)


@torch.fx.wrap
def soft_roi_pool(maps: Tensor, values: Tensor) -> Tensor:
    """Soft ROI pooling, Z[l, c] = sum over d and n of M[l, d, n] * Y'[c, d, n].

    Takes ROI maps M (B, L, D, N), probabilities over N, and values Y' (B, C, D, N); returns Z (B, L, C).
    """
    values = values.type_as(maps).transpose(1, 3)  # (B, N, D, C)
    pooled = [matmul(m, v) for m, v in zip(maps.unbind(2), values.unbind(2))]  # noqa: B905  (TorchScript)
    return torch.stack(pooled).sum(0)


@torch.fx.wrap
def back_fill(features: Tensor, heatmaps: Tensor, identity: Tensor) -> Tensor:
    """Back-filling, F[c, n] = sum over l of features[l, c] * heatmaps[l, n].

    Takes features (B, L, C1) and heatmaps (B, L, N); returns a map in the shape and memory format of the identity
    (B, C1, H, W).
    """
    if identity.is_contiguous(memory_format=torch.channels_last):
        filled = matmul(heatmaps.transpose(1, 2), features).transpose(1, 2)
    else:
        filled = matmul(features.transpose(1, 2), heatmaps)
    return filled.unflatten(2, identity.shape[2:])


class SoftRPN(nn.Module):
    """Soft region proposal network: ROI maps as a softmax over the positions of a feature map (Equation 1).

    The lower the temperature, the sharper the maps. Arguments as for `Depla`.
    """

    def __init__(
        self, in_chs: int, num_groups: int = 16, maps_per_group: int = 4, temperature: float = 1.0, **dd
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f'temperature must be positive and finite, got {temperature!r}; the paper uses 0.2 to 1.0')
        self.num_groups = num_groups
        self.maps_per_group = maps_per_group
        self.temperature = float(temperature)
        self.conv = Conv1x1(in_chs, num_groups * maps_per_group, **dd)  # ruling 8

    def forward(
        self, x: Tensor, other: Optional[Tensor] = None, upsample: str = 'bilinear', logits: Optional[Tensor] = None
    ) -> Tensor:
        """Map x (B, C1, H, W) to ROI maps M (B, L, D, N), each a distribution over its N positions.

        With another map, which may be larger, the maps have the size that x has after `match_size`. The convolution of
        x may be given as logits.
        """
        logits = self.conv(x) if logits is None else logits
        logits = logits.type_as(self.conv.weight) / self.temperature
        if other is not None:
            logits = match_size(logits, other, upsample)
        maps = softmax_positions(logits)  # (B, D*L, N)
        return maps.unflatten(1, (self.maps_per_group, self.num_groups)).transpose(1, 2)


class PlainBFN(nn.Module):
    """Plain back-filling network: heatmaps from the ROI maps alone. Arguments as for `Depla`."""

    def __init__(
        self, num_groups: int = 16, pooled_chs: int = 16, maps_per_group: int = 4, rescale_maps: bool = False, **dd
    ) -> None:
        super().__init__()
        self.rescale_maps = rescale_maps
        self.heatmap = Linear(num_groups * maps_per_group, num_groups, bias=False, **dd)  # ruling 8
        self.transform = Linear(pooled_chs, pooled_chs, **dd)

    def forward(
        self, identity: Tensor, pooled: Tensor, maps: Tensor, query: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """Pooled features Z (B, L, C) and ROI maps M (B, L, D, N) to Z' (B, L, C) and heatmaps B (B, L, N)."""
        maps = maps * maps.shape[-1] if self.rescale_maps else maps
        logits = self.heatmap(maps.transpose(1, 2).flatten(1, 2).transpose(1, 2))  # (B, N, D*L) -> (B, N, L)
        return self.transform(pooled), logits.softmax(dim=1).transpose(1, 2)


class AdaptiveBFN(nn.Module):
    """Adaptive back-filling network: each position of the identity attends to the pooled features."""

    def __init__(self, identity_chs: int, pooled_chs: int = 16, **dd) -> None:
        super().__init__()
        self.scale = pooled_chs**0.5
        self.query = Conv1x1(identity_chs, pooled_chs, **dd)  # ruling 8
        self.key = Linear(pooled_chs, pooled_chs, **dd)
        self.transform = Linear(pooled_chs, pooled_chs, **dd)

    def forward(
        self, identity: Tensor, pooled: Tensor, maps: Tensor, query: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """Identity X (B, C1, H, W) and pooled features Z (B, L, C) to Z' (B, L, C) and heatmaps B (B, L, N).

        The convolution of X may be given as query.
        """
        query = self.query(identity) if query is None else query
        query = F.normalize(query.flatten(2).type_as(maps), dim=1)  # (B, C, N), ruling 10
        key = F.normalize(self.key(pooled), dim=2) * self.scale  # (B, L, C)
        return self.transform(pooled), matmul(key, query).softmax(dim=-1)


class Depla(nn.Module):
    """Aggregation with feature detection: refines an identity with what is detected in a candidate.

    Args:
        identity_chs: Channels C1 of the identity X.
        candidate_chs: Channels C2 of the candidate Y; the identity's when None.
        num_groups: ROI groups L.
        pooled_chs: Pooled channels C (the paper's C2').
        maps_per_group: ROI maps a group, D.
        temperature: Softmax temperature T of the ROI maps.
        bfn: Back-filling network, 'plain' or 'adaptive'.
        rescale_maps: Multiply M by N before plain BFN's heatmap convolution (ruling 4(b)); adaptive BFN has none.
        norm_layer: Norm after the output convolution (ruling 5).
        upsample: How the smaller map is up-sampled where the sizes differ, 'bilinear' or 'nearest'.
        drop_path: Stochastic depth of the refinement, the part that is added to the identity.

    Raises:
        ValueError: If an argument is out of its range, or an input of another width than the block was built for.
    """

    def __init__(
        self,
        identity_chs: int,
        candidate_chs: Optional[int] = None,
        num_groups: int = 16,
        pooled_chs: int = 16,
        maps_per_group: int = 4,
        temperature: float = 1.0,
        bfn: str = 'plain',
        rescale_maps: bool = False,
        norm_layer: Type[nn.Module] = nn.BatchNorm2d,
        upsample: str = 'bilinear',
        drop_path: Optional[nn.Module] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        for name, value in dict(num_groups=num_groups, pooled_chs=pooled_chs, maps_per_group=maps_per_group).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value!r}; the paper uses 16, 16 and 4')
        if bfn not in ('plain', 'adaptive'):
            raise ValueError(f"bfn must be 'plain' or 'adaptive', got {bfn!r}")
        if upsample not in ('bilinear', 'nearest'):
            raise ValueError(f"upsample must be 'bilinear' or 'nearest', got {upsample!r}")
        self.identity_chs = identity_chs
        self.candidate_chs = candidate_chs or identity_chs
        self.maps_per_group = maps_per_group
        self.upsample = upsample
        self.rpn = SoftRPN(identity_chs, num_groups, maps_per_group, temperature, **dd)
        self.candidate = Conv1x1(self.candidate_chs, pooled_chs * maps_per_group, **dd)  # ruling 8
        if bfn == 'plain':
            self.bfn = PlainBFN(num_groups, pooled_chs, maps_per_group, rescale_maps, **dd)
        else:
            self.bfn = AdaptiveBFN(identity_chs, pooled_chs, **dd)
        self.proj = Linear(pooled_chs, identity_chs, bias=False, **dd)
        self.norm = norm_layer(identity_chs, **dd)
        self.drop_path = drop_path if drop_path is not None else nn.Identity()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Start every projection at unit gain, std 1 / sqrt(fan-in), but SoftRPN's at half of it (ruling 11)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                gain = 0.5 if module is self.rpn.conv else 1.0
                nn.init.normal_(module.weight, std=gain * module.weight.shape[1] ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, identity: Tensor, candidate: Tensor, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None
    ) -> Tensor:
        """Refine the identity X (B, C1, H, W) with the candidate Y (B, C2, h, w).

        With weight (C2, P) and bias (C2), Y = weight @ candidate + bias of a candidate (B, P, h, w), and is not made.

        If the sizes differ, the smaller map is up-sampled and the result has the larger size. What is linear is done
        where it is cheapest: maps are up-sampled after their 1x1 convolutions, which leave fewer channels, and the
        output projection and a BatchNorm come before back-filling, on L vectors instead of N positions.
        """
        if weight is None or bias is None:
            check_channels(identity, self.identity_chs, candidate, self.candidate_chs)
            values = self.candidate(candidate)
        else:
            values = compose_conv(candidate, weight, bias, self.candidate.weight)
        values = match_size(values, identity, self.upsample)  # (B, D*C, H, W)
        logits, query = self.convolve_identity(identity)
        maps = self.rpn(identity, values, self.upsample, logits)  # (B, L, D, N)
        if query is not None:
            query = match_size(query, values, self.upsample)
        identity = match_size(identity, values, self.upsample)
        values = values.flatten(2).unflatten(1, (self.maps_per_group, -1)).transpose(1, 2)  # (B, C, D, N)
        pooled = soft_roi_pool(maps, values)  # (B, L, C)
        features, heatmaps = self.bfn(identity, pooled, maps, query)  # (B, L, C), (B, L, N)
        features = self.proj(features)  # (B, L, C1)
        heatmaps = heatmaps * heatmaps.shape[-1]  # ruling 4(a): without N the result would fade with the resolution
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript skips only what stands below this line)
            if can_fold(self.norm):
                heatmaps = torch.cat([heatmaps - 1, torch.ones_like(heatmaps[:, :1])], dim=1)  # (B, L + 1, N)
                features = fold_into_features(self.norm, features, heatmaps[:, :-1])  # (B, L + 1, C1)
                return identity + back_fill(self.drop_path(features), heatmaps, identity).type_as(identity)
        x = self.norm(back_fill(features, heatmaps, identity))  # (B, C1, H, W)
        return identity + self.drop_path(x).type_as(identity)

    def convolve_identity(self, identity: Tensor) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """SoftRPN's logits and adaptive BFN's query in one convolution, where both have one and nothing listens."""
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript skips only what stands below this line)
            if isinstance(self.bfn, AdaptiveBFN):
                convs = [self.rpn.conv, self.bfn.query]
                if all(is_plain(conv, Conv1x1) for conv in convs):
                    weight = torch.cat([conv.weight.flatten(1) for conv in convs])
                    logits, query = convolve(identity, weight).split([conv.out_channels for conv in convs], dim=1)
                    return logits, query
        return None, None
