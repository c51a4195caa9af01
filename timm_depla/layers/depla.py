"""Aggregation with Feature Detection (DEPLA): the one implementation of the block, as the paper's figure shows it.

Paper: `Aggregation with Feature Detection`, Sun et al., ICCV 2021 -
https://openaccess.thecvf.com/content/ICCV2021/html/Sun_Aggregation_With_Feature_Detection_ICCV_2021_paper.html
Where the paper is ambiguous, the code follows a numbered ruling of docs/rulings.md. Symbols of the shapes below:
    B: batch, H, W: height and width, N: H * W positions
    C1, C2: channels of the identity X and of the candidate Y, C: pooled channels (the paper's C2')
    L: groups of regions of interest (ROI), D: ROI maps per group
"""

from typing import Any, Dict, Mapping, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor
from torch.nn.utils.fusion import fuse_linear_bn_weights

from . import fused
from .linear import ConvNorm, Linear, back_fill, match_size, mix, soft_roi_pool, softmax


class SoftRPN(nn.Module):
    """Soft region proposal network: ROI maps as a softmax over the positions of a feature map (Equation 1)."""

    def __init__(self, in_chs: int, num_groups: int, maps_per_group: int, temperature: float, upsample: str, **layers):
        super().__init__()
        if not (isinstance(temperature, (int, float)) and 0.001 <= temperature <= 1000):
            raise ValueError(f'temperature must be from 0.001 to 1000, got {temperature!r}; the paper uses 0.2 to 1.0')
        self.num_groups, self.maps_per_group = num_groups, maps_per_group
        self.temperature, self.upsample = float(temperature), upsample
        self.logits = ConvNorm(in_chs, num_groups * maps_per_group, **layers)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Map X (B, C1, h, w) to ROI maps M (B, L, D, H, W), up-sampled to the other map's size if that is larger."""
        logits = self.logits(x) if self.temperature == 1.0 else self.logits(x) / self.temperature  # (B, D*L, h, w)
        logits = match_size(logits, other, self.upsample)
        return softmax(logits).unflatten(1, (self.maps_per_group, self.num_groups)).transpose(1, 2)


class PlainBFN(nn.Module):
    """Plain back-filling network: heatmaps from the ROI maps alone."""

    def __init__(self, in_chs: int, num_groups: int, pooled_chs: int, maps_per_group: int, mode: str, norm_layer, **dd):
        super().__init__()
        self.heatmap = ConvNorm(num_groups * maps_per_group, num_groups, norm_layer, **dd)
        self.transform = Linear(pooled_chs, pooled_chs, **dd)

    def forward(self, identity: Tensor, pooled: Tensor, maps: Tensor) -> Tuple[Tensor, Tensor]:
        """Map Z (B, L, C) and M (B, L, D, H, W) to Z' (B, L, C) and heatmaps B (B, L, H, W)."""
        maps = maps.transpose(1, 2).flatten(1, 2)  # (B, D*L, H, W)
        log_maps = (maps * (maps.shape[2] * maps.shape[3])).clamp(min=1e-6).log()  # log(N M), ruling 4(b)
        return self.transform(pooled), softmax(self.heatmap(log_maps))


class AdaptiveBFN(nn.Module):
    """Adaptive back-filling network: each position of the identity attends to the pooled features."""

    def __init__(self, in_chs: int, num_groups: int, pooled_chs: int, maps_per_group: int, mode: str, norm_layer, **dd):
        super().__init__()
        self.upsample = mode
        self.query = ConvNorm(in_chs, pooled_chs, norm_layer, **dd)
        self.key = Linear(pooled_chs, pooled_chs, **dd)
        self.transform = Linear(pooled_chs, pooled_chs, **dd)

    def forward(self, identity: Tensor, pooled: Tensor, maps: Tensor) -> Tuple[Tensor, Tensor]:
        """Map X (B, C1, h, w), Z (B, L, C) and M (B, L, D, H, W) to Z' (B, L, C) and heatmaps B (B, L, H, W)."""
        query = match_size(self.query(identity), maps[:, 0], self.upsample)  # (B, C, H, W)
        key = F.normalize(self.key(pooled), dim=2)  # (B, L, C), ruling 10
        return self.transform(pooled), softmax(mix(query, key))  # <q_n, k_l>


BFNS = {'plain': PlainBFN, 'adaptive': AdaptiveBFN}
NETWORK_ARGS = ('num_groups', 'pooled_chs', 'maps_per_group', 'temperature', 'bfn', 'keep_candidate')  # of `Depla`


def check_depla_args(depla: Optional[Mapping[str, Any]], *network_args: str) -> Dict[str, Any]:
    """Copy a network's `depla`; TypeError if it is no map, or a key is no argument of `Depla` nor in `network_args`."""
    allowed, depla = [*network_args, *NETWORK_ARGS], {} if depla is None else depla
    unknown = sorted(set(depla) - set(allowed), key=str) if isinstance(depla, Mapping) else [depla]
    if unknown:
        raise TypeError(f'unknown depla argument {unknown}; depla is a map of some of {allowed}')
    return dict(depla)


@register_notrace_module  # control flow depends on sizes
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
        init_scale: Weight at which the norm of the refinement starts: 0.2, or 0 with `keep_candidate` (ruling 6).
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
        init_scale: Optional[float] = None,
        norm_layer: Type[nn.Module] = nn.BatchNorm2d,
        upsample: str = 'bilinear',
        drop_path: Optional[nn.Module] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        candidate_chs = candidate_chs or identity_chs
        for name, value in dict(num_groups=num_groups, pooled_chs=pooled_chs, maps_per_group=maps_per_group).items():
            if not (type(value) is int and value >= 1):
                raise ValueError(f'{name} must be a whole number from 1 on, got {value!r}; the paper uses 16, 16 and 4')
        known = dict(bfn=[*BFNS], upsample=['bilinear', 'nearest'], keep_candidate=[False, True])
        for name, value in dict(bfn=bfn, upsample=upsample, keep_candidate=keep_candidate).items():
            if value not in known[name]:
                raise ValueError(f'{name} must be one of {known[name]}, got {value!r}')
        keep_candidate = keep_candidate or not add_identity
        if keep_candidate and candidate_chs != identity_chs:
            raise ValueError(f'keep_candidate adds maps of one width, got {identity_chs} and {candidate_chs} channels')
        self.identity_chs, self.candidate_chs = identity_chs, candidate_chs
        self.keep_candidate, self.add_identity, self.upsample = keep_candidate, add_identity, upsample
        self.init_scale = init_scale if init_scale is not None else 0.0 if keep_candidate else 0.2
        layers = dict(norm_layer=norm_layer, device=device, dtype=dtype)
        self.rpn = SoftRPN(identity_chs, num_groups, maps_per_group, temperature, upsample, **layers)
        self.candidate = ConvNorm(candidate_chs, maps_per_group * pooled_chs, **layers)
        self.bfn = BFNS[bfn](identity_chs, num_groups, pooled_chs, maps_per_group, upsample, **layers)
        self.proj = Linear(pooled_chs, identity_chs, bias=False, device=device, dtype=dtype)
        self.norm = norm_layer(identity_chs, device=device, dtype=dtype)
        self.register_parameter('bias', None)  # what `reparameterize` leaves of the norm
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

    def forward(self, identity: Tensor, candidate: Tensor) -> Tensor:
        """Refine X (B, C1, h, w) with Y (B, C2, h, w) to (B, C1, H, W), the larger of their sizes."""
        self.check_channels(identity, candidate)
        if fused.use_fused_depla():
            return self.forward_fused(identity, candidate)
        values = match_size(self.candidate(candidate), identity, self.upsample)  # Y' (B, D*C, H, W)
        maps = self.rpn(identity, values)  # M (B, L, D, H, W)
        pooled = soft_roi_pool(maps, values)  # Z (B, L, C)
        vectors, heatmaps = self.bfn(identity, pooled, maps)  # Z' (B, L, C), B (B, L, H, W)
        filled = back_fill(self.proj(vectors), heatmaps, self.bias, identity.dtype)  # (B, C1, H, W)
        return self.combine(identity, candidate, self.norm(filled))

    @torch.jit.unused
    def forward_fused(self, identity: Tensor, candidate: Tensor) -> Tensor:
        return fused.forward(self, identity, candidate)

    def combine(self, identity: Tensor, candidate: Tensor, refinement: Tensor) -> Tensor:
        """X + refinement (B, C1, H, W), and Y where it is kept (rulings 2 and 14), in the type of X."""
        refinement = refinement.type_as(identity)
        if self.keep_candidate and self.add_identity:
            refinement = refinement + match_size(candidate, refinement, self.upsample)
        x = identity if self.add_identity else candidate
        return match_size(x, refinement, self.upsample) + self.drop_path(refinement)

    def check_channels(self, identity: Tensor, candidate: Tensor) -> None:
        if identity.shape[1] != self.identity_chs or candidate.shape[1] != self.candidate_chs:
            raise ValueError(
                f'this Depla was built for {self.identity_chs} identity and {self.candidate_chs} candidate channels, '
                f'but got {identity.shape[1]} and {candidate.shape[1]}; set identity_chs and candidate_chs to match'
            )

    def reparameterize(self) -> None:
        """Fuse the output's norm for inference; timm's `reparameterize_model` calls this."""
        if isinstance(norm := self.norm, nn.BatchNorm2d):
            statistics = norm.running_mean, norm.running_var, norm.eps
            weight, bias = fuse_linear_bn_weights(self.proj.weight, None, *statistics, norm.weight, norm.bias)
            self.proj.weight, self.bias, self.norm = weight, nn.Parameter(bias.view(1, 1, -1)), nn.Identity()
