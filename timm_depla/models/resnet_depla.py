"""ResNet, SE-ResNet and ResNeXt with DEPLA.

Paper: `Aggregation with Feature Detection`, Sun et al., ICCV 2021 -
https://openaccess.thecvf.com/content/ICCV2021/html/Sun_Aggregation_With_Feature_Detection_ICCV_2021_paper.html

Three residual blocks of stage 3 aggregate their shortcut and their weight layers with DEPLA instead of a sum (rulings 2
and 3 of docs/rulings.md). The rest is timm's ResNet, whose weights load by `load_backbone`.
"""

import itertools
from typing import Any, Callable, Dict, Optional, Sequence, Type, Union

import torch
import torch.nn as nn
from timm.layers import register_notrace_module, to_ntuple
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from timm_depla.layers import check_depla_args
from timm_depla.layers.fused import use_fused_depla

from .builder import build_model, imagenet_cfg
from .candidate import fuse_candidate, is_linear, refine
from .placement import create_depla, init_depla, split_depla_args

__all__ = ['BasicBlockDepla', 'BottleneckDepla', 'ResNetDepla']  # register_model adds each entrypoint


class _AggregateWithDepla:
    """Adds DEPLA to a residual block of timm."""

    def __init__(self, inplanes: int, planes: int, *args, depla: Dict[str, Any], **kwargs) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.depla = create_depla(self, planes * self.expansion, depla, **kwargs)

    def zero_init_last(self) -> None:
        """Do not zero the last norm: DEPLA would pool a candidate Y of zeros (ruling 6)."""


class BasicBlockDepla(_AggregateWithDepla, BasicBlock):
    """Basic residual block (two 3x3 convolutions) that aggregates with DEPLA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        return self.act2(self.depla(identity, x))


@register_notrace_module  # control flow depends on the fused form
class BottleneckDepla(_AggregateWithDepla, Bottleneck):
    """Bottleneck residual block (1x1, 3x3 and 1x1 convolutions) that aggregates with DEPLA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        if self.se is None and use_fused_depla():
            return self.act3(self.refine_fused(identity, x))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        return self.act3(self.depla(identity, x))

    @torch.jit.unused
    def refine_fused(self, identity: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return refine(self.depla, identity, x, self.conv3, self.bn3)

    def reparameterize(self) -> None:
        """Fuse the candidate's convolutions for inference; timm's `reparameterize_model` calls this."""
        if self.se is None and is_linear(self.conv3, self.bn3, self.depla):
            fuse_candidate(self.conv3, self.bn3, self.depla)
            self.conv3, self.bn3 = nn.Identity(), nn.Identity()


_DEPLA_BLOCKS = {BasicBlock: BasicBlockDepla, Bottleneck: BottleneckDepla}


def _at_positions(block: Type[nn.Module], positions: Sequence[int], depla: Dict[str, Any]) -> Callable[..., nn.Module]:
    """Return a block factory for timm's stage builder that makes blocks with DEPLA at the given positions."""
    if block not in _DEPLA_BLOCKS:
        raise ValueError(f'no DEPLA for residual block {block.__name__}; there is for BasicBlock and Bottleneck')
    index = itertools.count()

    def create_block(*args, **kwargs) -> nn.Module:
        if next(index) in positions:
            return _DEPLA_BLOCKS[block](*args, depla=depla, **kwargs)
        return block(*args, **kwargs)

    create_block.expansion = block.expansion
    return create_block


class ResNetDepla(ResNet):
    """timm's ResNet, with DEPLA in some residual blocks of one stage.

    Args:
        block: timm's BasicBlock or Bottleneck, or one for each stage.
        layers: Residual blocks in each stage.
        depla: Overrides of the paper's setting, see `split_depla_args`.
        **kwargs: Arguments of timm's ResNet.

    Raises:
        TypeError: If `depla` has an unknown key.
        ValueError: If the stage or a position does not exist, or an argument of `Depla` is out of range.
    """

    def __init__(
        self,
        block: Union[Type[nn.Module], Sequence[Type[nn.Module]]],
        layers: Sequence[int],
        depla: Optional[Dict[str, Any]] = None,
        **kwargs,
    ) -> None:
        stage, positions, block_args = split_depla_args(layers, depla)
        blocks = list(to_ntuple(len(layers))(block))
        blocks[stage - 1] = _at_positions(blocks[stage - 1], positions, block_args)
        super().__init__(blocks, layers, **kwargs)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise as timm does, except DEPLA, which keeps its own initialisation (ruling 11)."""
        super().init_weights(zero_init_last=zero_init_last)
        init_depla(self)


def _create_resnet_depla(variant: str, pretrained: bool, kwargs: Dict[str, Any], **model_args) -> ResNetDepla:
    """Build a variant; the caller's `kwargs` override its arguments, and those of `depla` key by key."""
    depla = {**model_args.pop('depla', {}), **check_depla_args(kwargs.pop('depla', None), 'stage', 'positions')}
    return build_model(ResNetDepla, variant, pretrained, depla=depla, **{**model_args, **kwargs})


def _cfg(**kwargs) -> Dict[str, Any]:
    return imagenet_cfg(**{'first_conv': 'conv1', 'classifier': 'fc', **kwargs})


_NAMES = (
    'resnet18_depla', 'resnet34_depla', 'resnet50_depla', 'resnet101_depla', 'resnet152_depla',
    'resnet50_depla_adaptive', 'seresnet18_depla', 'seresnet34_depla', 'seresnet50_depla', 'seresnet101_depla',
    'seresnet152_depla', 'seresnet50_depla_adaptive', 'resnext50_32x4d_depla',
)  # fmt: skip
_TINY = dict(input_size=(3, 128, 128), pool_size=(4, 4), first_conv='conv1.0')
default_cfgs = generate_default_cfgs(
    {**{f'{name}.untrained': _cfg() for name in _NAMES}, 'test_resnet_depla.untrained': _cfg(**_TINY)}
)
_SE = dict(block_args=dict(attn_layer='se'))


@register_model
def resnet18_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """ResNet-18 with plain DEPLA."""
    return _create_resnet_depla('resnet18_depla', pretrained, kwargs, block=BasicBlock, layers=(2, 2, 2, 2))


@register_model
def resnet34_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """ResNet-34 with plain DEPLA."""
    return _create_resnet_depla('resnet34_depla', pretrained, kwargs, block=BasicBlock, layers=(3, 4, 6, 3))


@register_model
def resnet50_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """ResNet-50 with plain DEPLA."""
    return _create_resnet_depla('resnet50_depla', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3))


@register_model
def resnet101_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """ResNet-101 with plain DEPLA."""
    return _create_resnet_depla('resnet101_depla', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 23, 3))


@register_model
def resnet152_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """ResNet-152 with plain DEPLA."""
    return _create_resnet_depla('resnet152_depla', pretrained, kwargs, block=Bottleneck, layers=(3, 8, 36, 3))


@register_model
def resnet50_depla_adaptive(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """ResNet-50 with adaptive DEPLA (Table 3)."""
    return _create_resnet_depla(
        'resnet50_depla_adaptive', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3), depla=dict(bfn='adaptive')
    )


@register_model
def seresnet18_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """SE-ResNet-18 with plain DEPLA."""
    return _create_resnet_depla('seresnet18_depla', pretrained, kwargs, block=BasicBlock, layers=(2, 2, 2, 2), **_SE)


@register_model
def seresnet34_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """SE-ResNet-34 with plain DEPLA."""
    return _create_resnet_depla('seresnet34_depla', pretrained, kwargs, block=BasicBlock, layers=(3, 4, 6, 3), **_SE)


@register_model
def seresnet50_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """SE-ResNet-50 with plain DEPLA."""
    return _create_resnet_depla('seresnet50_depla', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3), **_SE)


@register_model
def seresnet101_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """SE-ResNet-101 with plain DEPLA."""
    return _create_resnet_depla('seresnet101_depla', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 23, 3), **_SE)


@register_model
def seresnet152_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """SE-ResNet-152 with plain DEPLA."""
    return _create_resnet_depla('seresnet152_depla', pretrained, kwargs, block=Bottleneck, layers=(3, 8, 36, 3), **_SE)


@register_model
def seresnet50_depla_adaptive(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """SE-ResNet-50 with adaptive DEPLA."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), depla=dict(bfn='adaptive'), **_SE)
    return _create_resnet_depla('seresnet50_depla_adaptive', pretrained, kwargs, **model_args)


@register_model
def resnext50_32x4d_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """ResNeXt-50 32x4d with plain DEPLA."""
    return _create_resnet_depla(
        'resnext50_32x4d_depla', pretrained, kwargs, block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4
    )


@register_model
def test_resnet_depla(pretrained: bool = False, **kwargs) -> ResNetDepla:
    """Tiny ResNet with plain DEPLA, for tests and the embedded digits."""
    model_args = dict(block=[BasicBlock, BasicBlock, Bottleneck, BasicBlock], layers=(1, 1, 4, 1))
    model_args.update(stem_width=8, stem_type='deep', avg_down=True, channels=(16, 32, 48, 64))
    return _create_resnet_depla('test_resnet_depla', pretrained, kwargs, **model_args)
