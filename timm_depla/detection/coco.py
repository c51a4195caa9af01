"""COCO-format data: images with boxes and masks, their augmentation, and average precision."""

import contextlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image, Mask

from timm_depla.files import open_regular

from .predict import read_image
from .schema import check_coco

__all__ = ['CocoDetection', 'create_transform', 'evaluate_coco', 'to_results']

_logger = logging.getLogger(__name__)

METRICS = (
    'AP', 'AP50', 'AP75', 'AP_S', 'AP_M', 'AP_L', 'AR1', 'AR10', 'AR100', 'AR_S', 'AR_M', 'AR_L',
)  # in COCO's order  # fmt: skip


def create_transform(is_training: bool, hflip: float = 0.5) -> Callable[..., Any]:
    """Create a transform of image and target: the image to float from 0 to 1, and in training a horizontal flip.

    The detector itself resizes and normalises.
    """
    flip = [v2.RandomHorizontalFlip(hflip)] if is_training and hflip else []
    return v2.Compose([*flip, v2.ToDtype({Image: torch.float32, 'others': None}, scale=True), v2.ToPureTensor()])


class CocoDetection(torch.utils.data.Dataset):
    """Images of a folder with the objects of an annotation file.

    A sample is an image (3, H, W) as uint8 and a target: `boxes` (N, 4) in pixels as x1, y1, x2, y2, `labels` (N,) from
    1, `masks` (N, H, W) as uint8, and `image_id`. The transform may change both. Crowds are left out.

    Args:
        folder: Folder of the images.
        annotations: The annotation file: polygons, run lengths and crowds; category ids in any order, also with gaps.
        is_training: Leave out images without objects.
        transform: Applied to image and target.

    Attributes:
        coco: The annotations as pycocotools reads them.
        image_ids: The image id of each sample.
        category_ids: The category id of each label, from label 1 on.
        class_names: The category name of each label, from label 1 on.

    Raises:
        ValueError: If the annotation file is missing or no COCO file, an image is missing, or an
            annotation belongs to no image or category.
    """

    def __init__(
        self,
        folder: os.PathLike,
        annotations: os.PathLike,
        is_training: bool = False,
        transform: Optional[Callable[..., Any]] = None,
    ) -> None:
        self.folder = Path(folder)
        self.transform = transform
        self.coco = _read(Path(annotations))
        self.category_ids = sorted(self.coco.cats)
        self.class_names = [self.coco.cats[category]['name'] for category in self.category_ids]
        self._labels = {category: label for label, category in enumerate(self.category_ids, 1)}
        self._check()
        self.image_ids = sorted(self.coco.imgs)
        if is_training:
            self.image_ids = [image_id for image_id in self.image_ids if self._objects(image_id)]
            if not self.image_ids:
                raise ValueError(f"'{annotations}' has no objects to train on")
            if empty := len(self.coco.imgs) - len(self.image_ids):
                _logger.info('%s: left out %d images without objects', annotations, empty)

    def _check(self) -> None:
        """Raise ValueError for missing images and references, and warn of boxes without area, which are left out."""
        names = [image['file_name'] for image in self.coco.imgs.values()]
        if missing := [name for name in names if not os.path.isfile(self.folder / name)]:
            raise ValueError(f"{len(missing)} images are not in '{self.folder}': {_some(missing)}")
        for a in self.coco.anns.values():
            if a['image_id'] not in self.coco.imgs:
                raise ValueError(f'annotation {a["id"]} is of image {a["image_id"]}, which is not listed')
            if a['category_id'] not in self._labels:
                raise ValueError(f'annotation {a["id"]} is of category {a["category_id"]}, not listed')
        flat = [f'{a["id"]} {a.get("bbox")}' for a in self.coco.anns.values() if self._box(a) is None]
        if flat:
            _logger.warning('left out %d boxes without an area in the image: annotations %s', len(flat), _some(flat))

    def _box(self, annotation: Dict[str, Any]) -> Optional[List[float]]:
        """Corners of the box, clipped to the image; None if no area is left."""
        image = self.coco.imgs[annotation['image_id']]
        x, y, width, height = annotation.get('bbox') or (0, 0, 0, 0)
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, image['width']), min(y + height, image['height'])
        return [x1, y1, x2, y2] if x2 > x1 and y2 > y1 else None

    def _objects(self, image_id: int) -> List[Dict[str, Any]]:
        annotations = self.coco.imgToAnns[image_id]
        return [a for a in annotations if not a.get('iscrowd') and self._box(a) is not None]

    @property
    def has_masks(self) -> bool:
        """Whether any object has a mask."""
        return any(annotation.get('segmentation') for annotation in self.coco.anns.values())

    def __len__(self) -> int:
        return len(self.image_ids)

    def filename(self, index: int) -> str:
        return str(self.folder / self.coco.imgs[self.image_ids[index]]['file_name'])

    def __getitem__(self, index: int) -> Tuple[Tensor, Dict[str, Any]]:
        image_id = self.image_ids[index]
        pixels = read_image(self.filename(index))
        size = pixels.shape[1:]
        info = self.coco.imgs[image_id]
        if tuple(size) != (info['height'], info['width']):
            raise ValueError(
                f"image '{info['file_name']}' is {size[1]} x {size[0]} pixels, its annotation says "
                f'{info["width"]} x {info["height"]}'
            )
        objects = self._objects(image_id)
        boxes = torch.tensor([self._box(a) for a in objects], dtype=torch.float32).reshape(-1, 4)
        masks = [self.coco.annToMask(a) if a.get('segmentation') else np.zeros(size, np.uint8) for a in objects]
        target = dict(
            boxes=BoundingBoxes(boxes, format='XYXY', canvas_size=tuple(size)),
            labels=torch.tensor([self._labels[a['category_id']] for a in objects], dtype=torch.int64),
            masks=Mask(np.array(masks, np.uint8).reshape(-1, *size)),
            image_id=image_id,
        )
        sample = Image(pixels), target
        return sample if self.transform is None else self.transform(*sample)


def _read(path: Path) -> COCO:
    """Read the annotations and build pycocotools' index, without the text that it prints."""
    try:
        with open_regular(path) as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise ValueError(f"no annotation file '{path}'") from error
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"annotation file '{path}' is not JSON: {error}") from error
    try:
        check_coco(content)
    except ValueError as error:
        raise ValueError(f"annotation file '{path}': {error}") from error
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def to_results(image_id: int, detections: Dict[str, Tensor], category_ids: Sequence[int]) -> List[Dict[str, Any]]:
    """An image's detections in COCO's submission format.

    Args:
        image_id: The image's id in the annotations.
        detections: Output of a torchvision detector: boxes (N, 4), labels (N,) from 1, scores (N,), and masks
            (N, 1, H, W) as probabilities if it has them.
        category_ids: The category id of each label, from label 1 on.
    """
    boxes = box_convert(detections['boxes'].cpu().double(), 'xyxy', 'xywh').tolist()
    results = [
        dict(image_id=image_id, category_id=category_ids[label - 1], bbox=box, score=score)
        for label, box, score in zip(detections['labels'].tolist(), boxes, detections['scores'].tolist(), strict=True)
    ]
    if 'masks' in detections:
        for result, mask in zip(results, (detections['masks'][:, 0] > 0.5).cpu().numpy(), strict=True):
            encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            result['segmentation'] = dict(size=encoded['size'], counts=encoded['counts'].decode())
    return results


def evaluate_coco(
    coco: COCO, results: List[Dict[str, Any]], iou_type: str = 'bbox', fast: bool = False
) -> Tuple[Dict[str, float], str]:
    """Average precision and recall as COCO defines them, from 0 to 1, -1 where there is nothing to measure.

    Args:
        coco: The annotations.
        results: Detections, as `to_results` gives them.
        iou_type: 'bbox' or 'segm'.
        fast: Use faster-coco-eval instead of pycocotools.

    Returns:
        The values of METRICS, and COCO's table.
    """
    evaluator_class = COCOeval
    if fast:
        from faster_coco_eval import COCO as FastCOCO
        from faster_coco_eval import COCOeval_faster as evaluator_class

        coco = FastCOCO(coco.dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            left_out = 'bbox' if iou_type == 'segm' else 'segmentation'  # else areas would be taken from it
            found = coco.loadRes([{k: v for k, v in result.items() if k != left_out} for result in results])
        else:
            found = type(coco)()
            found.dataset = {**coco.dataset, 'annotations': []}
            found.createIndex()
        evaluator = evaluator_class(coco, found, iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as table:
        evaluator.summarize()
    return dict(zip(METRICS, map(float, list(evaluator.stats)[: len(METRICS)]), strict=True)), table.getvalue()
