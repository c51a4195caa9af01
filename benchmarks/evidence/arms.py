"""The networks that are compared: each is a model of timm and its arguments, or a detector and its."""

from dataclasses import dataclass, field
from typing import Any, Dict, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import create_model
from timm.models import register_model
from timm.models.resnet import ResNet

from timm_depla.models import resnet_depla

# A narrow ResNet of 0.9 M parameters; stage 3, of four bottlenecks, has 8 x 8 positions at 128 pixels.
NARROW = dict(layers=(1, 1, 4, 1), channels=(16, 32, 56, 160), stem_width=8)


@dataclass
class Arm:
    """A network of the study.

    Args:
        label: Its name in the tables.
        model: Its name in timm, or among the detectors.
        kwargs: Its arguments.
        task: 'classification' or 'detection'.
    """

    label: str
    model: str
    kwargs: Dict[str, Any] = field(default_factory=dict)
    task: str = 'classification'


class PooledBottleneck(nn.Module):
    """Adds to a map (B, C, H, W) what a bottleneck of two 1x1 convolutions makes of its average over the positions."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.expand(F.relu(self.reduce(x.mean((2, 3)))))[:, :, None, None]


@register_model
def test_resnet_pooled(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """The control: where `test_resnet_depla` has DEPLA, a sum with as many more parameters, to one in a hundred."""
    model = create_model('test_resnet', **kwargs)
    like = create_model('test_resnet_depla', **{**kwargs, 'device': 'meta'})
    blocks = [block.depla for block in like.layer3 if hasattr(block, 'depla')]
    for i, block in enumerate(like.layer3):
        if hasattr(block, 'depla'):
            channels = block.depla.identity_chs
            extra = sum(parameter.numel() for parameter in blocks[0].parameters())
            model.layer3[i].se = PooledBottleneck(channels, round((extra - channels) / (2 * channels + 1)))
    return model


@register_model
def test_resnet_depla_added(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """The alternative to ruling 2: the block returns DEPLA(X, Y) + Y."""
    model = resnet_depla.test_resnet_depla(**kwargs)
    for block in model.layer3:
        if hasattr(block, 'depla'):
            block.bn3.register_forward_hook(_listen)  # the block leaves Y out unless something listens
            block.depla.register_forward_hook(_add_candidate)
    return model


def _listen(module: nn.Module, inputs: Tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    pass


def _add_candidate(module: nn.Module, inputs: Tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    return out + inputs[1]


def _depla(label: str, **depla: Any) -> Arm:
    return Arm(label, 'test_resnet_depla', dict(NARROW, depla=depla) if depla else NARROW)


_SE = dict(block_args=dict(attn_layer='se'))

ARMS: Dict[str, Arm] = {
    'base': Arm('base', 'test_resnet', NARROW),
    'se': Arm('SE', 'test_resnet', NARROW | _SE),
    'depla': _depla('DEPLA, plain'),
    'adaptive': _depla('DEPLA, adaptive', bfn='adaptive'),
    'se-depla': Arm('SE + DEPLA, plain', 'test_resnet_depla', NARROW | _SE),
    'pooled': Arm('control: pooled bottleneck', 'test_resnet_pooled', NARROW),
    'added': Arm('candidate added as well', 'test_resnet_depla_added', NARROW),
    'rescaled': _depla('M times N', rescale_maps=True),
    't0.2': _depla('T = 0.2', temperature=0.2),
    't0.5': _depla('T = 0.5', temperature=0.5),
    't2': _depla('T = 2', temperature=2.0),
    'first': _depla('block 1 alone', positions=(1,)),
    'last': _depla('block 3 alone', positions=(3,)),
    'all': _depla('blocks 0 to 3', positions=(0, 1, 2, 3)),
    'l8': _depla('L = 8', num_groups=8),
    'l32': _depla('L = 32', num_groups=32),
    'c8': _depla("C' = 8", pooled_chs=8),
    'c32': _depla("C' = 32", pooled_chs=32),
    'd2': _depla('D = 2', maps_per_group=2),
    'd8': _depla('D = 8', maps_per_group=8),
    'fishnet': Arm('FishNet', 'test_fishnet'),
    'fishnet-depla': Arm('FishNet, DEPLA', 'test_fishnet_depla'),
    'fpn': Arm('FPN', 'maskrcnn_test_resnet_fpn', task='detection'),
    **{
        f'fpn-depla-{t}': Arm(
            f'FPN-DEPLA, T = {t}', 'maskrcnn_test_resnet_fpn_depla', dict(depla=dict(temperature=t)), 'detection'
        )
        for t in (0.2, 0.5, 1.0)
    },
    'backbone-fishnet': Arm('FishNet', 'maskrcnn_test_fishnet_fpn', task='detection'),
    'backbone-fishnet-depla': Arm('FishNet-DEPLA', 'maskrcnn_test_fishnet_depla_fpn', task='detection'),
}
