"""RegNetX and RegNetY with DEPLA, which the paper leaves to future work.

Papers: `Aggregation with Feature Detection`, Sun et al., ICCV 2021 -
https://openaccess.thecvf.com/content/ICCV2021/html/Sun_Aggregation_With_Feature_Detection_ICCV_2021_paper.html, and
`Designing Network Design Spaces`, Radosavovic et al., CVPR 2020 - https://arxiv.org/abs/2003.13678

Three blocks of stage 3 aggregate their shortcut and their weight layers with DEPLA instead of a sum. The rest is timm's
RegNet, whose weights load by `load_backbone`.
"""

from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from timm.layers import get_norm_layer
from timm.models import generate_default_cfgs, register_model
from timm.models.regnet import Bottleneck, RegNet, RegNetCfg, model_cfgs

from .builder import build_model, imagenet_cfg
from .candidate import fuse_candidate, is_linear
from .placement import create_depla, split_depla_args

__all__ = ['RegNetBottleneckDepla', 'RegNetDepla']  # register_model adds each entrypoint


class RegNetBottleneckDepla(nn.Module):
    """Bottleneck block of a RegNet that aggregates with DEPLA. Takes over the layers of timm's block."""

    def __init__(self, block: Bottleneck, depla: Dict[str, Any], **layers) -> None:
        super().__init__()
        if not isinstance(block, Bottleneck) or block.downsample is None:
            raise ValueError('no DEPLA for RegNet blocks with pre-activation or without a shortcut')
        for name, layer in block.named_children():
            self.add_module(name, layer)
        nn.init.ones_(self.conv3.bn.weight)  # at zero, DEPLA would pool a candidate Y of zeros (ruling 6)
        self.depla = create_depla(self, self.conv3.conv.out_channels, depla, **layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = self.downsample(x)
        x = self.conv3(self.se(self.conv2(self.conv1(x))))
        return self.act3(self.depla(identity, x))

    def reparameterize(self) -> None:
        """Fuse the candidate's convolutions for inference; timm's `reparameterize_model` calls this."""
        if is_linear(self.conv3.conv, self.conv3.bn, self.depla):
            fuse_candidate(self.conv3.conv, self.conv3.bn, self.depla)
            self.conv3.conv, self.conv3.bn = nn.Identity(), nn.Identity()


class RegNetDepla(RegNet):
    """timm's RegNet, with DEPLA in some blocks of one stage.

    Args:
        cfg: timm's configuration of a RegNetX or RegNetY.
        depla: Overrides of the paper's setting, see `split_depla_args`.
        device, dtype, **kwargs: Arguments of timm's RegNet.

    Raises:
        TypeError: If `depla` has an unknown key.
        ValueError: If the stage or a position does not exist, its block has pre-activation or no shortcut, or an
            argument of `Depla` is out of range.
    """

    def __init__(
        self, cfg: RegNetCfg, depla: Optional[Dict[str, Any]] = None, device=None, dtype=None, **kwargs
    ) -> None:
        super().__init__(cfg, device=device, dtype=dtype, **kwargs)
        stages = [self.s1, self.s2, self.s3, self.s4]
        stage, positions, block_args = split_depla_args([len(list(s.children())) for s in stages], depla)
        norm_layer = get_norm_layer(kwargs.get('norm_layer', cfg.norm_layer))
        layers = dict(norm_layer=norm_layer, device=device, dtype=dtype)
        for name in (f'b{position + 1}' for position in positions):
            block = getattr(stages[stage - 1], name)
            setattr(stages[stage - 1], name, RegNetBottleneckDepla(block, block_args, **layers))


def _create_regnet_depla(variant: str, pretrained: bool, **kwargs) -> RegNetDepla:
    """Build a variant with timm's configuration of the plain network."""
    return build_model(RegNetDepla, variant, pretrained, model_cfg=model_cfgs[variant.removesuffix('_depla')], **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return imagenet_cfg(interpolation='bicubic', first_conv='stem.conv', classifier='head.fc', **kwargs)


_NAMES = (
    'regnetx_008_depla', 'regnetx_016_depla', 'regnetx_032_depla', 'regnety_008_depla', 'regnety_016_depla',
    'regnety_032_depla', 'regnety_040_depla', 'regnety_080_depla',
)  # fmt: skip
_TINY = dict(input_size=(3, 128, 128), pool_size=(4, 4))
default_cfgs = generate_default_cfgs(
    {**{f'{name}.untrained': _cfg() for name in _NAMES}, 'test_regnet_depla.untrained': _cfg(**_TINY)}
)


@register_model
def regnetx_008_depla(pretrained: bool = False, **kwargs) -> RegNetDepla:
    """RegNetX-800MF with plain DEPLA."""
    return _create_regnet_depla('regnetx_008_depla', pretrained, **kwargs)


@register_model
def regnetx_016_depla(pretrained: bool = False, **kwargs) -> RegNetDepla:
    """RegNetX-1.6GF with plain DEPLA."""
    return _create_regnet_depla('regnetx_016_depla', pretrained, **kwargs)


@register_model
def regnetx_032_depla(pretrained: bool = False, **kwargs) -> RegNetDepla:
    """RegNetX-3.2GF with plain DEPLA."""
    return _create_regnet_depla('regnetx_032_depla', pretrained, **kwargs)


@register_model
def regnety_008_depla(pretrained: bool = False, **kwargs) -> RegNetDepla:
    """RegNetY-800MF with plain DEPLA."""
    return _create_regnet_depla('regnety_008_depla', pretrained, **kwargs)


@register_model
def regnety_016_depla(pretrained: bool = False, **kwargs) -> RegNetDepla:
    """RegNetY-1.6GF with plain DEPLA."""
    return _create_regnet_depla('regnety_016_depla', pretrained, **kwargs)


@register_model
def regnety_032_depla(pretrained: bool = False, **kwargs) -> RegNetDepla:
    """RegNetY-3.2GF with plain DEPLA."""
    return _create_regnet_depla('regnety_032_depla', pretrained, **kwargs)


@register_model
def regnety_040_depla(pretrained: bool = False, **kwargs) -> RegNetDepla:
    """RegNetY-4.0GF with plain DEPLA."""
    return _create_regnet_depla('regnety_040_depla', pretrained, **kwargs)


@register_model
def regnety_080_depla(pretrained: bool = False, **kwargs) -> RegNetDepla:
    """RegNetY-8.0GF with plain DEPLA."""
    return _create_regnet_depla('regnety_080_depla', pretrained, **kwargs)


@register_model
def test_regnet_depla(pretrained: bool = False, **kwargs) -> RegNetDepla:
    """Tiny RegNetY with plain DEPLA, for tests."""
    cfg = RegNetCfg(w0=16, wa=8.0, wm=2.0, group_size=8, depth=12, se_ratio=0.25, stem_width=16)
    return build_model(RegNetDepla, 'test_regnet_depla', pretrained, model_cfg=cfg, **kwargs)
