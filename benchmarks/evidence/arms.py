"""The networks that are compared: timm models or detectors, with their arguments."""

from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import create_model
from timm.layers import NonLocalAttn
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, test_resnet

from timm_depla.models.fishnet_depla import FishNet
from timm_depla.models.resnet_depla import test_resnet_depla

# A narrow ResNet, of 0.8 M parameters with its bottlenecks in stage 3: 8 x 8 positions at 64 pixels, 6 x 6 at 48.
NARROW = dict(channels=(16, 32, 56, 160), stem_width=8)


@dataclass
class Arm:
    """A network of the study.

    Args:
        label: Its name in the tables.
        model: Its name in timm, or among the detectors.
        kwargs: Its arguments.
        base: The arm that it is compared with; a base is compared with itself.
        task: 'classification' or 'detection'.
        flags: Of training, over the recipe's.
        seeds: Runs that count.
        trunk: The arm whose network of the same seed it starts from; from scratch if empty.
        rate_of: The arm whose learning rate it takes; tuned on its own if empty.
    """

    label: str
    model: str
    kwargs: Dict[str, Any] = field(default_factory=dict)
    base: str = 'base'
    task: str = 'classification'
    flags: Tuple[str, ...] = ()
    seeds: int = 10
    trunk: str = ''
    rate_of: str = ''


class PooledBottleneck(nn.Module):
    """Adds to a map (B, C, H, W) the output of a bottleneck of two 1x1 convolutions for its global average."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.expand(F.relu(self.reduce(x.mean((2, 3)))))[:, :, None, None]


def _narrow(entrypoint: Callable[..., ResNet], stage: int, kwargs: Dict[str, Any]) -> ResNet:
    """The narrow ResNet: one block a stage, in `stage` four bottlenecks; no max-pooling, for these images are small."""
    blocks = [Bottleneck if number == stage else BasicBlock for number in range(1, 5)]
    layers = [4 if number == stage else 1 for number in range(1, 5)]
    model = entrypoint(**{**NARROW, 'block': blocks, 'layers': layers, **kwargs})
    model.maxpool = nn.Identity()
    return model


@register_model
def narrow_resnet(pretrained: bool = False, stage: int = 3, **kwargs: Any) -> ResNet:
    """The base. The other networks differ in the last three blocks of `stage`."""
    return _narrow(test_resnet, stage, kwargs)


@register_model
def narrow_resnet_depla(pretrained: bool = False, stage: int = 3, **kwargs: Any) -> ResNet:
    """The base with DEPLA."""
    return _narrow(test_resnet_depla, stage, {**kwargs, 'depla': dict(stage=stage) | kwargs.get('depla', {})})


@register_model
def narrow_resnet_nl(pretrained: bool = False, stage: int = 3, **kwargs: Any) -> ResNet:
    """The base with timm's non-local blocks where others have DEPLA."""
    model = narrow_resnet(stage=stage, **kwargs)
    for block in getattr(model, f'layer{stage}')[1:]:
        block.se = NonLocalAttn(block.bn3.num_features)
    return model


@register_model
def narrow_resnet_pooled(pretrained: bool = False, stage: int = 3, **kwargs: Any) -> ResNet:
    """The control: in place of DEPLA, a sum with as many additional parameters, within 1%."""
    model = narrow_resnet(stage=stage, **kwargs)
    like = narrow_resnet_depla(stage=stage, **{**kwargs, 'device': 'meta'})
    for block, other in zip(getattr(model, f'layer{stage}')[1:], getattr(like, f'layer{stage}')[1:], strict=True):
        channels = other.depla.identity_chs
        extra = sum(parameter.numel() for parameter in other.depla.parameters())
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


def _depla(label: str, base: str = 'base', **depla: Any) -> Arm:
    return Arm(label, 'narrow_resnet_depla', dict(depla=depla), base)


def _context(label: str, attn_layer: str) -> Arm:
    return Arm(label, 'narrow_resnet', dict(block_args=dict(attn_layer=attn_layer)))


def _sgd(arm: Arm) -> Arm:
    flags = ('--opt', 'sgd', '--momentum', '0.9', '--weight-decay', '0.0005')
    return replace(arm, label=f'{arm.label}, SGD', base=f'{arm.base}-sgd', flags=flags)


def _detector(label: str, model: str, base: str, rate_of: str = '', **kwargs: Any) -> Arm:
    return Arm(label, f'maskrcnn_{model}', kwargs, base, 'detection', ('--epochs', '8'), seeds=5, rate_of=rate_of)


NORM = dict(neck_norm='batchnorm2d')
CONTEXT = ('se', 'gc', 'cbam', 'nl')  # modules that are known to gain on ImageNet: what a proxy is calibrated by

ARMS: Dict[str, Arm] = {
    'base': Arm('base', 'narrow_resnet'),
    'se': _context('SE', 'se'),
    'gc': _context('GC', 'gca'),
    'cbam': _context('CBAM', 'cbam'),
    'nl': Arm('non-local', 'narrow_resnet_nl'),
    'depla': _depla('DEPLA'),
    'adaptive': _depla('adaptive DEPLA', bfn='adaptive'),
    'kept': _depla('DEPLA, candidate kept', keep_candidate=True),
    'adaptive-kept': replace(_depla('adaptive DEPLA, candidate kept', bfn='adaptive', keep_candidate=True), seeds=5),
    'se-depla': replace(_context('SE + DEPLA', 'se'), model='narrow_resnet_depla', base='se', seeds=5),
    'pooled': Arm('control: pooled bottleneck', 'narrow_resnet_pooled'),
}
ARMS |= {f'{name}-sgd': _sgd(ARMS[name]) for name in ('base', 'se', 'depla', 'adaptive', 'kept')}
TUNED = dict(trunk='base', base='again', flags=('--epochs', '2', '--val-interval', '2'))
ARMS |= {
    'again': Arm('base, trained again', 'narrow_resnet', **TUNED),
    'inserted': replace(_depla('base with DEPLA inserted', keep_candidate=True), **TUNED),
    'fishnet': Arm('FishNet', 'narrow_fishnet', base='fishnet', seeds=5),
    'fishnet-depla': Arm('FishNet-DEPLA', 'narrow_fishnet_depla', base='fishnet', seeds=5),
    'fpn': _detector('FPN', 'test_resnet_fpn', 'fpn'),
    **{
        f'fpn-depla-{t}': _detector(
            f'FPN-DEPLA, T = {t}',
            'test_resnet_fpn_depla',
            'fpn',
            rate_of='' if t == 0.5 else 'fpn-depla-0.5',
            depla=dict(temperature=t),
        )
        for t in (0.2, 0.5, 1.0)
    },
    'fpn-norm': _detector('FPN, norms in the pyramid', 'test_resnet_fpn', 'fpn', 'fpn-depla-0.5', **NORM),
    'backbone-fishnet': _detector('FishNet', 'test_fishnet_fpn', 'backbone-fishnet'),
    'backbone-fishnet-depla': _detector('FishNet-DEPLA', 'test_fishnet_depla_fpn', 'backbone-fishnet'),
    'backbone-fishnet-norm': _detector(
        'FishNet, norms in the pyramid', 'test_fishnet_fpn', 'backbone-fishnet-norm', 'backbone-fishnet', **NORM
    ),
    'backbone-fishnet-depla-norm': _detector(
        'FishNet-DEPLA, norms in the pyramid',
        'test_fishnet_depla_fpn',
        'backbone-fishnet-norm',
        'backbone-fishnet-depla',
        **NORM,
    ),
}
