"""Object detection and instance segmentation: torchvision's detectors with DEPLA."""

from .fpn import FeaturePyramidNetworkDepla
from .pretrained import detector_config, from_pretrained, is_detector
from .rcnn import BackboneWithFPN, create_detector, list_detectors

__all__ = [
    'BackboneWithFPN', 'FeaturePyramidNetworkDepla', 'create_detector', 'detector_config', 'from_pretrained',
    'is_detector', 'list_detectors',
]  # fmt: skip
