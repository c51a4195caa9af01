"""Detect objects in image files and draw them: `python -m timm_depla.detection.predict RUN IMAGE ...`."""

import argparse
import colorsys
import io
import os
import sys
from pathlib import Path
from typing import Dict, Sequence

import torch
from PIL import ImageFont, ImageOps
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from timm_depla.files import open_image

from .pretrained import from_pretrained

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


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m timm_depla.detection.predict', description=__doc__.split(':')[0])
    parser.add_argument('source', metavar='RUN', help="a run's folder or a checkpoint's")
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='image files')
    parser.add_argument('--output', metavar='DIR', default='.', help='where to write IMAGE.detections.png')
    parser.add_argument('--threshold', type=float, metavar='X', default=0.5, help='lowest score to draw')
    args = parser.parse_args()
    try:
        model = from_pretrained(args.source)
        Path(args.output).mkdir(parents=True, exist_ok=True)
        for path in map(Path, args.images):
            image = read_image(path)
            detections = predict(model, image, args.threshold)
            target = Path(args.output, f'{path.stem}.detections.png')
            to_pil_image(draw_detections(image, detections, model.class_names)).save(target)
            names = [model.class_names[label - 1] for label in detections['labels'].tolist()]
            print(f'{target}: {len(names)} found{": " if names else ""}{", ".join(names)}')
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f'{parser.prog}: error: {error}')


if __name__ == '__main__':
    main()
