"""The networks that are compared: timm models or detectors, with their arguments."""

from functools import partial
from typing import Any, Callable, Dict, NamedTuple, Sequence

import timm
import torch
import torch.nn as nn
from timm.layers import GlobalContext, NonLocalAttn, SEModule, get_device_dtype
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, test_resnet
from torch import Tensor

from timm_depla.models.resnet_depla import test_resnet_depla

# A narrow ResNet, of 0.8 M parameters with its bottlenecks in stage 3: 8 x 8 positions at 64 pixels, 6 x 6 at 48.
NARROW = dict(channels=(16, 32, 56, 160), stem_width=8)


class Variant(NamedTuple):
    """A network of the study."""

    label: str  # in the tables
    model: str  # in timm, or among the detectors
    kwargs: Dict[str, Any] = {}
    rate_of: str = ''  # the variant whose learning rate it takes; tuned on its own if empty
    flags: Sequence[str] = ()  # more for its training

    @property
    def is_detector(self) -> bool:
        return self.model.startswith('maskrcnn_')


def _narrow(entrypoint: Callable[..., ResNet], stage: int, kwargs: Dict[str, Any]) -> ResNet:
    """The narrow ResNet: one block a stage, in `stage` four bottlenecks; no max-pooling, for these images are small."""
    blocks = [Bottleneck if number == stage else BasicBlock for number in range(1, 5)]
    layers = [4 if number == stage else 1 for number in range(1, 5)]
    model = entrypoint(**{**NARROW, 'block': blocks, 'layers': layers, **kwargs})
    model.pretrained_cfg['architecture'] = entrypoint.__name__.replace('test', 'narrow')  # its checkpoints name it
    model.maxpool = nn.Identity()
    return model


@register_model
def narrow_resnet(pretrained: bool = False, stage: int = 3, **kwargs: Any) -> ResNet:
    """The base. The other networks differ in `stage`."""
    return _narrow(test_resnet, stage, {**kwargs, 'pretrained': pretrained})


@register_model
def narrow_resnet_depla(pretrained: bool = False, stage: int = 3, **kwargs: Any) -> ResNet:
    """The base with DEPLA in the last three blocks of `stage`."""
    depla = dict(stage=stage) | kwargs.get('depla', {})
    return _narrow(test_resnet_depla, stage, {**kwargs, 'depla': depla, 'pretrained': pretrained})


ATTENTION = {  # 76 channels: as many parameters as DEPLA has at 224, within 1%
    'nl': NonLocalAttn,
    'pooled': partial(GlobalContext, use_attn=False, fuse_add=True, fuse_scale=False, rd_channels=76),
}


@register_model
def narrow_resnet_attn(pretrained: bool = False, stage: int = 3, attn: str = 'nl', **kwargs: Any) -> ResNet:
    """The base with a module of timm where another has DEPLA: non-local, or a bottleneck over the mean of the map."""
    assert not pretrained, 'its checkpoints are not loaded anywhere'
    model = narrow_resnet(stage=stage, **kwargs)
    for block in getattr(model, f'layer{stage}')[1:]:
        block.se = ATTENTION[attn](block.bn3.num_features)
    return model


LITE0 = 'tf_efficientnet_lite0'
PLACES = ('blocks.4.1', 'blocks.4.2')  # of LITE0, where `backbone_depla` inserts: 112 channels at 1/16


class GainedSE(SEModule):
    """Squeeze-and-excitation as x + gain * (SE(x) - x), with a gain of each channel that starts at zero."""

    def __init__(self, chs: int, **dd) -> None:
        super().__init__(chs, **dd)
        self.gain = nn.Parameter(torch.zeros(chs, 1, 1, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * (super().forward(x) - x)


class AddedContext(GlobalContext):
    """timm's global context block in its form that adds; it starts at zero, its last bias too."""

    def __init__(self, chs: int, **kwargs) -> None:
        super().__init__(chs, fuse_add=True, fuse_scale=False, **kwargs)
        nn.init.zeros_(self.mlp_add.fc2.bias)


MODULES = {  # each starts at zero; 79 channels give the control as many parameters as plain DEPLA
    'se': GainedSE, 'gc': AddedContext, 'nl': NonLocalAttn,
    'control': partial(AddedContext, use_attn=False, rd_channels=79),
}  # fmt: skip


@register_model
def lite0_module(pretrained: bool = False, module: str = 'se', **kwargs: Any) -> nn.Module:
    """EfficientNet-Lite0 with another module where `backbone_depla` has DEPLA; it starts as the network alone."""
    model = timm.create_model(LITE0, pretrained=pretrained, **kwargs)
    for name in PLACES:
        block = model.get_submodule(name)
        added = MODULES[module](block.conv_pwl.out_channels, **get_device_dtype(model))
        added.is_new = True  # it trains at the whole rate
        model.set_submodule(name, nn.Sequential(block, added))
    return model


FPN, FPN_DEPLA = 'maskrcnn_test_resnet_fpn', 'maskrcnn_test_resnet_fpn_depla'
FISHNET, FISHNET_DEPLA = 'maskrcnn_test_fishnet_fpn', 'maskrcnn_test_fishnet_depla_fpn'
NORM, MEAN = dict(neck_norm='batchnorm2d'), dict(depla=dict(temperature=1000))

VARIANTS: Dict[str, Variant] = {
    'base': Variant('base', 'narrow_resnet'),
    'se': Variant('SE', 'narrow_resnet', dict(block_args=dict(attn_layer='se'))),
    'gc': Variant('GC', 'narrow_resnet', dict(block_args=dict(attn_layer='gca'))),
    'cbam': Variant('CBAM', 'narrow_resnet', dict(block_args=dict(attn_layer='cbam'))),
    'nl': Variant('non-local', 'narrow_resnet_attn'),
    'control': Variant('control', 'narrow_resnet_attn', dict(attn='pooled')),
    'depla': Variant('DEPLA', 'narrow_resnet_depla'),
    'adaptive': Variant('adaptive DEPLA', 'narrow_resnet_depla', dict(depla=dict(bfn='adaptive')), 'depla'),
    'kept': Variant('candidate-kept DEPLA', 'narrow_resnet_depla', dict(depla=dict(keep_candidate=True)), 'depla'),
    'mean': Variant('DEPLA at T = 1000', 'narrow_resnet_depla', MEAN, 'depla'),
    'lite0': Variant('host', LITE0),
    'lite0-depla': Variant('DEPLA', 'backbone_depla', dict(backbone=LITE0)),
    'lite0-adaptive': Variant('adaptive DEPLA', 'backbone_depla', dict(backbone=LITE0, depla=dict(bfn='adaptive'))),
    'lite0-se': Variant('SE', 'lite0_module', dict(module='se')),
    'lite0-gc': Variant('GC', 'lite0_module', dict(module='gc')),
    'lite0-nl': Variant('non-local', 'lite0_module', dict(module='nl')),
    'lite0-control': Variant('control', 'lite0_module', dict(module='control')),
    'fpn': Variant('FPN', FPN),
    'fpn-depla-0.2': Variant('FPN-DEPLA, T = 0.2', FPN_DEPLA, dict(depla=dict(temperature=0.2)), 'fpn-depla-0.5'),
    'fpn-depla-0.5': Variant('FPN-DEPLA, T = 0.5', FPN_DEPLA, dict(depla=dict(temperature=0.5))),
    'fpn-depla-1.0': Variant('FPN-DEPLA, T = 1.0', FPN_DEPLA, dict(depla=dict(temperature=1.0)), 'fpn-depla-0.5'),
    'fpn-norm': Variant('FPN + norms', FPN, NORM, 'fpn-depla-0.5'),
    'backbone-fishnet': Variant('FishNet', FISHNET),
    'backbone-fishnet-depla': Variant('FishNet-DEPLA', FISHNET_DEPLA),
    'backbone-fishnet-norm': Variant('FishNet + norms', FISHNET, NORM, 'backbone-fishnet'),
    'backbone-fishnet-depla-norm': Variant('FishNet-DEPLA + norms', FISHNET_DEPLA, NORM, 'backbone-fishnet-depla'),
    'fishnet': Variant('FishNet', FISHNET, NORM),
    'fishnet-long': Variant('FishNet, 12 epochs', FISHNET, NORM, 'fishnet', ('--epochs', '12', '--val-interval', '12')),
    'fishnet-depla': Variant('FishNet-DEPLA', FISHNET_DEPLA, NORM),
    'fishnet-mean': Variant('control (T = 1000)', FISHNET_DEPLA, {**NORM, 'backbone_kwargs': MEAN}, 'fishnet-depla'),
}
