"""The networks that are compared: timm models or detectors, with their arguments."""

from dataclasses import dataclass, field
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import create_model
from timm.models import register_model
from timm.models.resnet import ResNet

from timm_depla.models.fishnet_depla import FishNet

DETECTION_EPOCHS = 8
LONG_EPOCHS = 24  # three times the recipe's

# A narrow ResNet of 0.8 M parameters; stage 3, of four bottlenecks, has 8 x 8 positions at 64 pixels.
NARROW = dict(layers=(1, 1, 4, 1), channels=(16, 32, 56, 160), stem_width=8)


@dataclass
class Arm:
    """A network of the study.

    Args:
        label: Its name in the tables.
        model: Its name in timm, or among the detectors.
        kwargs: Its arguments.
        base: The arm that it is compared with; a base is compared with itself.
        task: 'classification' or 'detection'.
        epochs: Training epochs; those of the recipe if None.
        rate_of: The arm whose learning rate it uses, if it is not tuned itself.
    """

    label: str
    model: str
    kwargs: Dict[str, Any] = field(default_factory=dict)
    base: str = 'base'
    task: str = 'classification'
    epochs: Optional[int] = None
    rate_of: Optional[str] = None


class PooledBottleneck(nn.Module):
    """Adds to a map (B, C, H, W) the output of a bottleneck of two 1x1 convolutions for its global average."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.expand(F.relu(self.reduce(x.mean((2, 3)))))[:, :, None, None]


def _narrow(name: str, kwargs: Dict[str, Any]) -> ResNet:
    """The narrow ResNet, without the max-pooling of its stem: these images are small."""
    model = create_model(name, **{**NARROW, **kwargs})
    model.maxpool = nn.Identity()
    return model


@register_model
def narrow_resnet(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """The base."""
    return _narrow('test_resnet', kwargs)


@register_model
def narrow_resnet_depla(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """The base with DEPLA, in the last three blocks of stage 3 by default."""
    return _narrow('test_resnet_depla', kwargs)


@register_model
def narrow_resnet_pooled(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """The control: in place of DEPLA, a sum with as many additional parameters, within 1%."""
    model = narrow_resnet(**kwargs)
    for block, like in zip(model.layer3, narrow_resnet_depla(**{**kwargs, 'device': 'meta'}).layer3, strict=True):
        if hasattr(like, 'depla'):
            channels = like.depla.identity_chs
            extra = sum(parameter.numel() for parameter in like.depla.parameters())
            block.se = PooledBottleneck(channels, round((extra - channels) / (2 * channels + 1)))
    return model


def _narrow_fishnet(name: str, kwargs: Dict[str, Any]) -> FishNet:
    """The tiny FishNet, also without the max-pooling of its stem."""
    model = create_model(name, **kwargs)
    model.pool = nn.Identity()
    return model


@register_model
def narrow_fishnet(pretrained: bool = False, **kwargs: Any) -> FishNet:
    """The base of FishNet."""
    return _narrow_fishnet('test_fishnet', kwargs)


@register_model
def narrow_fishnet_depla(pretrained: bool = False, **kwargs: Any) -> FishNet:
    """FishNet with DEPLA in its body and head."""
    return _narrow_fishnet('test_fishnet_depla', kwargs)


def _variant(label: str, **depla: Any) -> Arm:
    return Arm(label, 'narrow_resnet_depla', dict(depla=depla), base='depla')


def _detector(label: str, model: str, base: str, **depla: Any) -> Arm:
    return Arm(label, f'maskrcnn_{model}', dict(depla=depla) if depla else {}, base, 'detection', DETECTION_EPOCHS)


_SE = dict(block_args=dict(attn_layer='se'))
_DEEP = dict(layers=(1, 1, 6, 1))  # DEPLA in blocks 1, 3 and 5 of stage 3, as in ResNet-50

ARMS: Dict[str, Arm] = {
    'base': Arm('base', 'narrow_resnet'),
    'se': Arm('SE', 'narrow_resnet', _SE),
    'depla': Arm('DEPLA', 'narrow_resnet_depla'),
    'adaptive': Arm('adaptive DEPLA', 'narrow_resnet_depla', dict(depla=dict(bfn='adaptive'))),
    'se-depla': Arm('SE + DEPLA', 'narrow_resnet_depla', _SE, base='se'),
    'pooled': Arm('control: pooled bottleneck', 'narrow_resnet_pooled'),
    'kept': _variant('DEPLA, candidate kept', keep_candidate=True),
    't0.2': _variant('T = 0.2', temperature=0.2),
    't0.5': _variant('T = 0.5', temperature=0.5),
    't2': _variant('T = 2', temperature=2.0),
    'first': _variant('block 1 alone', positions=(1,)),
    'last': _variant('block 3 alone', positions=(3,)),
    'all': _variant('blocks 0 to 3', positions=(0, 1, 2, 3)),
    'l8': _variant('L = 8', num_groups=8),
    'l32': _variant('L = 32', num_groups=32),
    'c8': _variant("C' = 8", pooled_chs=8),
    'c32': _variant("C' = 32", pooled_chs=32),
    'd2': _variant('D = 2', maps_per_group=2),
    'd8': _variant('D = 8', maps_per_group=8),
    'base-deep': Arm('base, 6 blocks', 'narrow_resnet', _DEEP, 'base-deep', rate_of='base'),
    'depla-deep': Arm('DEPLA in 3 of 6 blocks', 'narrow_resnet_depla', _DEEP, 'base-deep', rate_of='depla'),
    'base-long': Arm('base, 24 epochs', 'narrow_resnet', {}, 'base-long', epochs=LONG_EPOCHS, rate_of='base'),
    'depla-long': Arm('DEPLA, 24 epochs', 'narrow_resnet_depla', {}, 'base-long', epochs=LONG_EPOCHS, rate_of='depla'),
    'fishnet': Arm('FishNet', 'narrow_fishnet', base='fishnet'),
    'fishnet-depla': Arm('FishNet-DEPLA', 'narrow_fishnet_depla', base='fishnet'),
    'fpn': _detector('FPN', 'test_resnet_fpn', 'fpn'),
    **{
        f'fpn-depla-{t}': _detector(f'FPN-DEPLA, T = {t}', 'test_resnet_fpn_depla', 'fpn', temperature=t)
        for t in (0.2, 0.5, 1.0)
    },
    'backbone-fishnet': _detector('FishNet', 'test_fishnet_fpn', 'backbone-fishnet'),
    'backbone-fishnet-depla': _detector('FishNet-DEPLA', 'test_fishnet_depla_fpn', 'backbone-fishnet'),
}
