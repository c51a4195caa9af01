"""Aggregation with Feature Detection (DEPLA): the one implementation of the block.

Paper: `Aggregation with Feature Detection`, Sun et al., ICCV 2021 -
https://openaccess.thecvf.com/content/ICCV2021/html/Sun_Aggregation_With_Feature_Detection_ICCV_2021_paper.html
Where the paper is ambiguous, the code follows a numbered ruling of docs/rulings.md. Symbols of the shapes below:
    B: batch, H, W: height and width, N: H * W positions
    C1, C2: channels of the identity X and of the candidate Y, C: pooled channels (the paper's C2')
    L: groups of regions of interest (ROI), D: ROI maps per group
"""

import math
from typing import Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor

from .fold import can_fold, fold_into_features, has_hooks, launches_cost, scale_and_level
from .linear import ConvNorm, Linear, is_autocast, matmul

__all__ = ['SoftRPN', 'soft_roi_pool', 'PlainBFN', 'AdaptiveBFN', 'Depla', 'match_size']


@register_notrace_function
def match_size(x: Tensor, other: Tensor, mode: str) -> Tensor:
    """Up-sample x (B, C, H, W) to the maximum of its own and the other map's height and width, in its type.

    On a GPU, autocast would make it a map of float32.
    """
    height, width = max(x.shape[2], other.shape[2]), max(x.shape[3], other.shape[3])
    if height == x.shape[2] and width == x.shape[3]:
        return x
    if not torch.jit.is_scripting():
        if is_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return F.interpolate(x, size=[height, width], mode=mode)
    return F.interpolate(x, size=[height, width], mode=mode)


def pool_repeated(x: Tensor, other: Tensor) -> Tensor:
    """Average x (B, C, H, W) over each block of positions for which nearest up-sampling repeats one of the other map.

    Then the other map need not be up-sampled: every sum of Equation 1 and of back-filling has equal terms in a block.
    Returns x if the other map is not smaller by whole factors, or in an export, whose sizes may be symbols.
    """
    if torch.compiler.is_exporting():
        return x
    rows, columns = x.shape[2] // other.shape[2], x.shape[3] // other.shape[3]
    if rows * other.shape[2] != x.shape[2] or columns * other.shape[3] != x.shape[3] or rows * columns <= 1:
        return x
    return F.avg_pool2d(x, [rows, columns])


def softmax_positions(x: Tensor) -> Tensor:
    """Softmax over the positions, from logits (B, K, H, W) to (B, K, N), in the memory format of the logits."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.flatten(2).transpose(1, 2).softmax(1).transpose(1, 2)
    return x.flatten(2).softmax(2)


def soft_roi_pool(maps: Tensor, values: Tensor) -> Tensor:
    """Soft ROI pooling, Z[l, c] = sum over d and n of M[l, d, n] * Y'[c, d, n].

    Takes ROI maps M (B, L, D, N), probabilities over the positions, and Y' (B, D*C, H, W); returns Z (B, L, C).
    """
    values = values.type_as(maps).flatten(2).unflatten(1, (maps.shape[2], -1))  # (B, D, C, N)
    if values.is_contiguous():
        return matmul(maps.transpose(1, 2), values.transpose(2, 3)).sum(1)
    rows = values.permute(0, 3, 1, 2).flatten(1, 2)  # (B, N*D, C), a view of channels-last memory
    return matmul(maps.permute(0, 1, 3, 2).flatten(2), rows)


def back_fill(
    features: Tensor, heatmaps: Tensor, like: Tensor, dtype: torch.dtype, level: Optional[Tensor] = None
) -> Tensor:
    """Back-filling, F[c, n] = sum over l of features[l, c] * heatmaps[l, n], plus level[c].

    Takes features (B, L, C1), heatmaps (B, L, N), a level (1, 1, C1) that is zero if None, and the type of the map that
    F is added to; returns F (B, C1, H, W) in the size and memory format of `like`.
    """
    if dtype == torch.bfloat16:  # half the memory, and the range of float32, which float16 has not (ruling 9)
        features, heatmaps = features.to(dtype), heatmaps.to(dtype)
        level = None if level is None else level.to(dtype)
    if like.is_contiguous(memory_format=torch.channels_last):
        filled = matmul(heatmaps.transpose(1, 2), features, level).transpose(1, 2)
    else:
        filled = matmul(features.transpose(1, 2), heatmaps, None if level is None else level.transpose(1, 2))
    return filled.unflatten(2, like.shape[2:])


class Level(nn.Module):
    """What remains of a norm whose factor is in the weights before it: adds a vector (C,), in the type of the map."""

    def __init__(self, level: Tensor) -> None:
        super().__init__()
        self.register_buffer('level', level)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.level.type_as(x).view(-1, 1, 1)


class SoftRPN(nn.Module):
    """Soft region proposal network: ROI maps as a softmax over the positions of a feature map (Equation 1)."""

    def __init__(self, in_chs: int, num_groups: int, maps_per_group: int, temperature: float, upsample: str, **layers):
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f'temperature must be positive and finite, got {temperature!r}; the paper uses 0.2 to 1.0')
        self.num_groups = num_groups
        self.maps_per_group = maps_per_group
        self.temperature = float(temperature)
        self.upsample = upsample
        self.logits = ConvNorm(in_chs, num_groups * maps_per_group, **layers)

    def forward(self, x: Tensor, other: Tensor, logits: Optional[Tensor] = None) -> Tensor:
        """Map X (B, C1, H, W) to ROI maps M (B, L, D, N), up-sampled to the other map's size if that is larger.

        `logits` are those of X (B, D*L, H, W), if they are known.
        """
        if logits is None:
            logits = self.logits(x)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        logits = match_size(logits, other, self.upsample)
        return softmax_positions(logits).unflatten(1, (self.maps_per_group, self.num_groups)).transpose(1, 2)


class PlainBFN(nn.Module):
    """Plain back-filling network: heatmaps from the ROI maps alone."""

    def __init__(
        self, identity_chs: int, num_groups: int, pooled_chs: int, maps_per_group: int, upsample: str, norm_layer, **dd
    ):
        super().__init__()
        self.heatmap = ConvNorm(num_groups * maps_per_group, num_groups, norm_layer, **dd)
        self.transform = Linear(pooled_chs, pooled_chs, **dd)

    def forward(
        self, identity: Tensor, pooled: Tensor, maps: Tensor, like: Tensor, query: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """Map Z (B, L, C) and M (B, L, D, N) to Z' (B, L, C) and heatmaps B (B, L, N)."""
        levels = (maps * maps.shape[3]).clamp(min=1e-6).log()  # log(N M), ruling 4(b)
        logits = self.heatmap(levels.transpose(1, 2).flatten(1, 2).unflatten(2, like.shape[2:]))  # (B, L, H, W)
        return self.transform(pooled), softmax_positions(logits)


class AdaptiveBFN(nn.Module):
    """Adaptive back-filling network: each position of the identity attends to the pooled features."""

    def __init__(
        self, identity_chs: int, num_groups: int, pooled_chs: int, maps_per_group: int, upsample: str, norm_layer, **dd
    ):
        super().__init__()
        self.upsample = upsample
        self.query = ConvNorm(identity_chs, pooled_chs, norm_layer, **dd)
        self.key = Linear(pooled_chs, pooled_chs, **dd)
        self.transform = Linear(pooled_chs, pooled_chs, **dd)

    def forward(
        self, identity: Tensor, pooled: Tensor, maps: Tensor, like: Tensor, query: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """Map X (B, C1, h, w) and Z (B, L, C) to Z' (B, L, C) and heatmaps B (B, L, N), in the size of `like`.

        `query` is that of X (B, C, h, w), if it is known.
        """
        if query is None:
            query = self.query(identity)
        query = match_size(query, like, self.upsample).flatten(2)  # (B, C, N)
        key = F.normalize(self.key(pooled), dim=2)  # (B, L, C), ruling 10
        return self.transform(pooled), matmul(key, query).softmax(dim=2)


BFNS = {'plain': PlainBFN, 'adaptive': AdaptiveBFN}


@register_notrace_module  # control flow depends on sizes, memory formats and hooks
class Depla(nn.Module):
    """Aggregation with feature detection: refines the identity X with features pooled from the candidate Y.

    Args:
        identity_chs: Channels C1 of the identity X.
        candidate_chs: Channels C2 of the candidate Y; the identity's when None.
        num_groups: ROI groups L.
        pooled_chs: Pooled channels C (the paper's C2').
        maps_per_group: ROI maps per group, D.
        temperature: Softmax temperature T of the ROI maps; the lower, the sharper.
        bfn: Back-filling network, 'plain' or 'adaptive'.
        keep_candidate: Return X + Y + refinement instead of X + refinement. The refinement starts at zero, so that a
            pretrained network starts unchanged (ruling 14).
        add_identity: False if Y already contains X, as a residual block's output does: return Y + refinement.
        norm_layer: Norm of the convolution layers (ruling 5).
        upsample: How the smaller map is up-sampled where the sizes differ, 'bilinear' or 'nearest'.
        drop_path: Stochastic depth, applied to everything that is added to the identity.

    Raises:
        ValueError: If an argument is out of range, or an input has the wrong number of channels.
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
        keep_candidate: bool = False,
        add_identity: bool = True,
        norm_layer: Type[nn.Module] = nn.BatchNorm2d,
        upsample: str = 'bilinear',
        drop_path: Optional[nn.Module] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        candidate_chs = candidate_chs or identity_chs
        for name, value in dict(num_groups=num_groups, pooled_chs=pooled_chs, maps_per_group=maps_per_group).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value!r}; the paper uses 16, 16 and 4')
        for name, value, known in (('bfn', bfn, BFNS), ('upsample', upsample, ('bilinear', 'nearest'))):
            if value not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}')
        keep_candidate = keep_candidate or not add_identity
        if keep_candidate and candidate_chs != identity_chs:
            raise ValueError(f'keep_candidate adds maps of one width, got {identity_chs} and {candidate_chs} channels')
        self.identity_chs, self.candidate_chs = identity_chs, candidate_chs
        self.upsample = upsample
        self.keep_candidate = keep_candidate
        self.add_identity = add_identity
        self.init_scale = 0.0 if keep_candidate else 0.2  # of the refinement, ruling 6
        layers = dict(norm_layer=norm_layer, device=device, dtype=dtype)
        self.rpn = SoftRPN(identity_chs, num_groups, maps_per_group, temperature, upsample, **layers)
        self.candidate = ConvNorm(candidate_chs, maps_per_group * pooled_chs, **layers)
        self.bfn = BFNS[bfn](identity_chs, num_groups, pooled_chs, maps_per_group, upsample, **layers)
        self.proj = Linear(pooled_chs, identity_chs, bias=False, device=device, dtype=dtype)
        self.norm = norm_layer(identity_chs, device=device, dtype=dtype)
        self.drop_path = drop_path if drop_path is not None else nn.Identity()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise projections with std 1 / sqrt(fan-in), and the norms of SoftRPN and output (rulings 6, 11)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.rpn.logits.norm.weight, 0.5)
        nn.init.constant_(self.norm.weight, self.init_scale)

    def reparameterize(self) -> None:
        """Fuse the output's norm for inference; timm's `reparameterize_model` calls this."""
        if isinstance(self.norm, nn.BatchNorm2d) and can_fold(self.norm):
            with torch.no_grad():
                scale, level = scale_and_level(self.norm)
                self.proj.weight.mul_(scale.unsqueeze(1))
            self.norm = Level(level)

    def forward(
        self, identity: Tensor, candidate: Tensor, logits: Optional[Tensor] = None, query: Optional[Tensor] = None
    ) -> Tensor:
        """Refine the identity X (B, C1, H, W) with the candidate Y (B, C2, h, w).

        The result has the larger of the two sizes: smaller maps are up-sampled after their 1x1 convolutions. `logits`
        and `query` are SoftRPN's and the adaptive back-filling network's of X, if they are known.
        """
        if identity.shape[1] != self.identity_chs or candidate.shape[1] != self.candidate_chs:
            raise ValueError(
                f'this Depla was built for {self.identity_chs} identity and {self.candidate_chs} candidate channels, '
                f'but got {identity.shape[1]} and {candidate.shape[1]}; set identity_chs and candidate_chs to match'
            )
        values = self.candidate(candidate)
        if not torch.jit.is_scripting():
            if self.upsample == 'nearest' and not has_hooks(self):
                values = pool_repeated(values, identity)
        refinement = self.aggregate(identity, values, logits, query)
        if self.keep_candidate:
            refinement = match_size(refinement, candidate, self.upsample)
            candidate = match_size(candidate, refinement, self.upsample)
            if not self.add_identity:
                return candidate + self.drop_path(refinement)
            refinement = refinement + candidate
        refined = match_size(identity, refinement, self.upsample) + self.drop_path(refinement)
        return match_size(refined, candidate, self.upsample)

    def aggregate(
        self, identity: Tensor, values: Tensor, logits: Optional[Tensor] = None, query: Optional[Tensor] = None
    ) -> Tensor:
        """Compute the refinement (B, C1, H, W) of X from the transformed candidate Y' (B, D*C, H, W)."""
        values = match_size(values, identity, self.upsample)  # Y'
        maps = self.rpn(identity, values, logits)  # M (B, L, D, N)
        pooled = soft_roi_pool(maps, values)  # Z (B, L, C)
        features, heatmaps = self.bfn(identity, pooled, maps, values, query)  # Z' (B, L, C), B (B, L, N)
        features = self.proj(features)  # (B, L, C1); cheaper before back-filling: L vectors, not N positions
        heatmaps = heatmaps * heatmaps.shape[2]  # ruling 4(a)
        if not torch.jit.is_scripting() and not launches_cost(features):  # a GPU is faster with a norm of the map
            if isinstance(self.norm, Level) and not has_hooks(self.norm):
                level = self.norm.level.view(1, 1, -1)
                return back_fill(features, heatmaps, values, identity.dtype, level).type_as(identity)
            is_answerable = not self.norm.training or heatmaps[:, 0].numel() > 1  # else as BatchNorm answers it
            if is_answerable and can_fold(self.norm):
                features, heatmaps, level = fold_into_features(self.norm, features, heatmaps)
                return back_fill(features, heatmaps, values, identity.dtype, level).type_as(identity)
        return self.norm(back_fill(features, heatmaps, values, identity.dtype)).type_as(identity)
