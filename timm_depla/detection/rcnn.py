"""Faster and Mask R-CNN of torchvision over the backbones of timm, with FPN or FPN-DEPLA as the neck."""

import fnmatch
import re
from collections import OrderedDict
from inspect import signature
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch.nn as nn
from timm.layers import Format, convert_sync_batchnorm, freeze_batch_norm_2d, get_norm_layer
from timm.models import group_parameters
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from timm_depla.schema import DETECTOR, check

from .fpn import FeaturePyramidNetworkDepla

__all__ = ['BackboneWithFPN', 'create_detector', 'list_detectors']

REDUCTIONS = (4, 8, 16, 32)
ANCHOR_SIZES = (32, 64, 128, 256, 512)  # torchvision's, in pixels, one for each level of the pyramid
BACKBONES = ('resnet50', 'resnet101', 'resnext101_32x4d', 'fishnet150', 'fishnet150_depla')  # of Tables 4 and 5
_OWN = {'device', 'dtype', 'features_only', 'in_chans', 'model_name', 'out_indices', 'pretrained'}  # of the backbone
NORMS = {'batch': lambda body: body, 'frozen': freeze_batch_norm_2d, 'sync': convert_sync_batchnorm}


def list_detectors(filter: str = '') -> List[str]:
    """Names of the paper's detectors that match a wildcard pattern; all by default.

    `create_detector` takes more: every timm model with features at 1/4 to 1/32 can be the backbone.
    """
    names = [f'{head}_{backbone}_fpn' for head in ('fasterrcnn', 'maskrcnn') for backbone in BACKBONES]
    names += ['fasterrcnn_resnet50_fpn_depla', 'maskrcnn_resnet50_fpn_depla']
    return sorted(name for name in names if fnmatch.fnmatch(name, filter or '*'))


def split_name(name: str) -> Tuple[str, str, str]:
    """Split a detector's name into head, backbone and neck.

    Raises:
        ValueError: If the name has another form, or timm has no such backbone.
    """
    match = re.fullmatch(r'(fasterrcnn|maskrcnn)_(.+)_(fpn|fpn_depla)', name)
    if not match or not timm.is_model(match[2]):
        raise ValueError(f"no detector '{name}': give fasterrcnn or maskrcnn, a model of timm, and fpn or fpn_depla")
    return match[1], match[2], match[3]


def _layers(body: nn.Module, full: nn.Module) -> Dict[str, int]:
    """timm's coarse layer group of each parameter of a `features_only` model, counted from the stem."""
    groups = group_parameters(full, full.group_matcher(coarse=True), reverse=True)
    groups = {**{name.replace('.', '_', 1): group for name, group in groups.items()}, **groups}  # flattened modules
    return {name: groups[name.removeprefix('model.')] for name, _ in body.named_parameters()}


class BackboneWithFPN(nn.Module):
    """Features of a backbone at 1/4, 1/8, 1/16 and 1/32 of the image, and a pyramid on them.

    Its parts are named as in torchvision, `body` and `fpn`; see `create_detector` for the arguments.
    """

    def __init__(
        self,
        backbone: str,
        neck: str = 'fpn',
        pretrained: bool = False,
        out_channels: int = 256,
        trainable_layers: Optional[int] = None,
        norm: Optional[str] = None,
        depla: Optional[Dict[str, Any]] = None,
        neck_norm: Optional[str] = None,
        backbone_kwargs: Optional[Dict[str, Any]] = None,
    ) -> None:
        super().__init__()
        kwargs = dict(backbone_kwargs or {})
        if taken := sorted(kwargs.keys() & _OWN):
            raise TypeError(f'backbone_kwargs: leave out {taken}; pretrained_backbone loads weights, .to() moves them')
        full = timm.create_model(backbone, device='meta', **kwargs)
        found = [level['reduction'] for level in full.feature_info]
        indices = [i for i, reduction in enumerate(found) if reduction in REDUCTIONS]
        if [found[i] for i in indices] != list(REDUCTIONS):
            raise ValueError(f"backbone '{backbone}' has features at 1/{found}, a detector needs 1/{REDUCTIONS}")
        body = timm.create_model(backbone, pretrained=pretrained, features_only=True, out_indices=indices, **kwargs)
        if (layout := Format(getattr(body, 'output_fmt', 'NCHW')).value) != 'NCHW':
            raise ValueError(f"backbone '{backbone}' gives features in the layout {layout}, a pyramid takes NCHW")
        layers = _layers(body, full)
        count = max(layers.values()) + 1
        norm = norm or ('frozen' if pretrained else 'batch')
        if norm not in NORMS:
            raise ValueError(f'backbone_norm must be one of {sorted(NORMS)}, got {norm!r}')
        if trainable_layers is None:
            trainable_layers = count - 2 if norm == 'frozen' else count
        if not 0 <= trainable_layers <= count:
            raise ValueError(f"trainable_backbone_layers must be 0 to {count} for '{backbone}', got {trainable_layers}")
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(layers[name] >= count - trainable_layers)
        self.body = NORMS[norm](body)
        try:
            norm_layer = get_norm_layer(neck_norm)
        except KeyError as error:
            raise ValueError(f"neck_norm: timm has no norm {neck_norm!r}; take 'batchnorm2d' or 'groupnorm'") from error
        kwargs = dict(extra_blocks=LastLevelMaxPool(), norm_layer=norm_layer)
        channels = self.body.feature_info.channels()
        if neck == 'fpn_depla':
            self.fpn = FeaturePyramidNetworkDepla(channels, out_channels, **kwargs, depla=depla)
        elif depla:
            raise ValueError(f"neck '{neck}' has no DEPLA to set {sorted(depla)} of; take neck 'fpn_depla'")
        else:
            self.fpn = FeaturePyramidNetwork(channels, out_channels, **kwargs)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Images (B, 3, H, W) to maps '0' to '3' at 1/4 to 1/32 and 'pool' at 1/64."""
        return self.fpn(OrderedDict([(str(i), feature) for i, feature in enumerate(self.body(x))]))


def create_detector(
    name: str,
    num_classes: int = 91,
    pretrained_backbone: bool = False,
    trainable_backbone_layers: Optional[int] = None,
    backbone_norm: Optional[str] = None,
    backbone_kwargs: Optional[Dict[str, Any]] = None,
    depla: Optional[Dict[str, Any]] = None,
    neck_norm: Optional[str] = None,
    out_channels: int = 256,
    anchor_sizes: Sequence[int] = ANCHOR_SIZES,
    **kwargs,
) -> FasterRCNN:
    """A detector by name: 'fasterrcnn' or 'maskrcnn', a backbone of timm, and the neck 'fpn' or 'fpn_depla'.

    Example:
        model = create_detector('maskrcnn_resnet50_fpn_depla', num_classes=91, depla=dict(temperature=0.2))

    Args:
        name: HEAD_BACKBONE_NECK, such as 'maskrcnn_resnet50_fpn_depla'; see `list_detectors`.
        num_classes: Number of classes, background included.
        pretrained_backbone: Load the backbone's pretrained weights.
        trainable_backbone_layers: Number of backbone layers to train, counted from the end. A ResNet has five, other
            networks as many as timm's coarse layer groups. By default all; with frozen norms, all but the first two.
        backbone_norm: BatchNorm of the backbone: 'batch' leaves it, 'frozen' freezes it, 'sync' shares its statistics
            between processes. By default 'frozen' if the backbone is pretrained, else 'batch'.
        backbone_kwargs: Arguments of the backbone.
        depla: Arguments of FPN-DEPLA, such as temperature.
        neck_norm: timm's name of a norm after each convolution of the pyramid, such as 'batchnorm2d'; by default none,
            as in the paper. From scratch, detectors over FishNet learn sooner with one (docs/protocol.md).
        out_channels: Channels of the pyramid; the heads' widths are in proportion.
        anchor_sizes: Sizes of the anchors in pixels, one for each of the five levels.
        **kwargs: Arguments of torchvision's FasterRCNN or MaskRCNN.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If the name is unknown or an argument is out of range.
    """
    head, backbone_name, neck = split_name(name)
    detector = dict(fasterrcnn=FasterRCNN, maskrcnn=MaskRCNN)[head]
    parts = (FasterRCNN, detector, GeneralizedRCNNTransform)
    known = {key for part in parts for key in signature(part).parameters} - {'backbone', 'num_classes', 'kwargs'}
    if unknown := sorted(kwargs.keys() - known):  # torchvision would ignore them
        raise TypeError(f'unknown argument {unknown}; there are {sorted(known)}')
    kwargs = {key: value for key, value in kwargs.items() if value is not None}  # torchvision's default
    own = dict(num_classes=num_classes, out_channels=out_channels, anchor_sizes=anchor_sizes, neck_norm=neck_norm)
    own.update(trainable_backbone_layers=trainable_backbone_layers, backbone_kwargs=backbone_kwargs, depla=depla)
    check({**own, **kwargs}, DETECTOR, 'the detector')
    backbone = BackboneWithFPN(
        backbone_name, neck, pretrained_backbone, out_channels, trainable_backbone_layers, backbone_norm, depla,
        neck_norm, backbone_kwargs,
    )  # fmt: skip
    config = getattr(backbone.body, 'pretrained_cfg', {})
    kwargs = {'image_mean': config.get('mean'), 'image_std': config.get('std'), **kwargs}
    ratios = ((0.5, 1.0, 2.0),) * len(anchor_sizes)
    kwargs.setdefault('rpn_anchor_generator', AnchorGenerator(tuple((size,) for size in anchor_sizes), ratios))
    kwargs.setdefault('box_head', TwoMLPHead(out_channels * 7**2, 4 * out_channels))
    kwargs.setdefault('box_predictor', FastRCNNPredictor(4 * out_channels, num_classes))
    if detector is MaskRCNN:
        kwargs.setdefault('mask_head', MaskRCNNHeads(out_channels, (out_channels,) * 4, 1))
        kwargs.setdefault('mask_predictor', MaskRCNNPredictor(out_channels, out_channels, num_classes))
    return detector(backbone, **kwargs)
