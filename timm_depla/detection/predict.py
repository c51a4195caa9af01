"""Detect objects in images and draw them; the command is `timm_depla.predict`."""

import colorsys
import io
import os
from typing import Dict, Sequence

import torch
from PIL import ImageFont, ImageOps
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from timm_depla.files import open_image

__all__ = ['draw_detections', 'predict', 'read_image']


def read_image(path: os.PathLike) -> Tensor:
    """Read an image file as uint8 (3, H, W), turned by its EXIF orientation.

    Raises:
        OSError: If it cannot be read.
    """
    return pil_to_tensor(ImageOps.exif_transpose(open_image(path, 'RGB')))


@torch.inference_mode()
def predict(model: FasterRCNN, image: Tensor, threshold: float = 0.5) -> Dict[str, Tensor]:
    """Detect the objects of an image, highest score first.

    Args:
        model: A detector, on any device; put into evaluation mode.
        image: uint8 (3, H, W).
        threshold: The lowest score to keep, from 0 to 1.

    Returns:
        Boxes (N, 4) in pixels as x1, y1, x2, y2, labels (N,) from 1, scores (N,) and, of Mask R-CNN, masks (N, H, W) of
        bool, all on the CPU.
    """
    device = next(model.parameters()).device
    found = model.eval()([to_dtype(image, torch.float32, scale=True).to(device)])[0]
    found = {name: value[found['scores'] >= threshold].cpu() for name, value in found.items()}
    if 'masks' in found:
        found['masks'] = found['masks'][:, 0] > 0.5
    return found


def draw_detections(image: Tensor, detections: Dict[str, Tensor], class_names: Sequence[str]) -> Tensor:
    """Draw boxes, masks, class names and scores on an image, a colour for each class.

    Args:
        image: uint8 (3, H, W).
        detections: Output of `predict`.
        class_names: Names of the labels from 1 on.

    Returns:
        uint8 (3, H, W).
    """
    labels = detections['labels'].tolist()
    if not labels:
        return image
    hues = [colorsys.hsv_to_rgb((label - 1) / len(class_names), 0.9, 1.0) for label in labels]
    colors = [tuple(round(255 * part) for part in hue) for hue in hues]
    for mask, color in zip(detections.get('masks', ()), colors, strict=False):  # together, they would overlap in black
        image = draw_segmentation_masks(image, mask, alpha=0.5, colors=[color])
    scores = detections['scores'].tolist()
    texts = [f'{class_names[label - 1]} {score:.2f}' for label, score in zip(labels, scores, strict=True)]
    size = max(image.shape[1:])
    return draw_bounding_boxes(
        image,
        detections['boxes'],
        texts,
        colors=colors,
        width=max(2, round(size / 400)),
        font=io.BytesIO(ImageFont.load_default(10).font_bytes),  # Pillow's own, in any size
        font_size=max(10, round(size / 40)),
        label_colors='black',
        fill_labels=True,
    )
