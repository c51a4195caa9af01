"""Digits in scenes: a small COCO-format data set of real handwritten digits on textured backgrounds.

`python -m timm_depla.data.scenes DIR` writes it: images in `train/` and `val/`, exact masks and boxes in
`annotations/instances_train.json` and `instances_val.json`. The splits use the digits of the embedded data set's
`train/` and `validation/`. Each image has its own random generator, seeded by its split and number.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from timm_depla.errors import ConfigError, require

from .digits import digits_folder
from .folders import write_once

__all__ = ['scenes_folder']

IMAGES = {'train': 800, 'val': 200}
_DIGITS = {'train': 'train', 'val': 'validation'}
_SIZE = 320  # pixels, height and width
_HEIGHTS = (24, 310)  # of a digit with an empty margin, log-uniform
_MAX_DIGITS = 7
_EMPTY = 0.03  # of the images
_TRIES = 20  # to place a digit without overlap

Digit = Tuple[int, np.ndarray]  # class, 8 x 8 grey levels


def scenes_folder(root: Optional[os.PathLike] = None, val_images: Optional[int] = None) -> Path:
    """Return the folder of scenes, writing it on first use.

    Objects have COCO's small, medium and large areas; a few images are empty. `category_id` is the digit plus one.

    Args:
        root: Where to keep it; `$XDG_CACHE_HOME/timm_depla/scenes` (by default under `~/.cache`) when None.
        val_images: Images of validation when it is written; 200 when None. Others have the same first ones.

    Raises:
        ConfigError: If it has to be written and cannot be, or scikit-learn or pycocotools is not installed.
    """
    counts = {**IMAGES, 'val': val_images or IMAGES['val']}
    return write_once(root, 'scenes', lambda folder: (folder / 'annotations').is_dir(), partial(_write, counts))


def _write(counts: Dict[str, int], folder: Path) -> None:
    require('pycocotools', 'detection')
    (folder / 'annotations').mkdir(parents=True)
    for number, (split, count) in enumerate(counts.items()):
        paths = sorted((digits_folder() / _DIGITS[split]).glob('*/*.png'))
        digits = [(int(path.parent.name), np.asarray(Image.open(path))) for path in paths]
        (folder / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            pixels, objects = draw_scene(np.random.default_rng((number, index)), digits)
            name = f'{index:06d}.jpg'
            Image.fromarray(pixels).save(folder / split / name, quality=95)
            images.append(dict(id=index + 1, file_name=name, height=_SIZE, width=_SIZE))
            for label, mask in objects:
                identity = dict(id=len(annotations) + 1, image_id=index + 1, category_id=label + 1, iscrowd=0)
                annotations.append({**identity, **_annotate(mask)})
        content = dict(
            info=dict(description='Digits in scenes', version='1'),
            images=images,
            annotations=annotations,
            categories=[dict(id=digit + 1, name=str(digit), supercategory='digit') for digit in range(10)],
        )
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def draw_scene(random: np.random.Generator, digits: Sequence[Digit]) -> Tuple[np.ndarray, List[Tuple[int, np.ndarray]]]:
    """Draw one image: pixels (320, 320, 3) as uint8, and class and mask (320, 320) of each digit, without overlap."""
    canvas = _texture(random)
    taken = np.zeros((_SIZE, _SIZE), bool)
    objects = []
    count = 0 if random.random() < _EMPTY else random.integers(1, _MAX_DIGITS + 1)
    heights = np.exp(random.uniform(*np.log(_HEIGHTS), count)).round().astype(int)
    for height in sorted(heights, reverse=True):
        label, pixels = digits[random.integers(len(digits))]
        cell = Image.fromarray(np.pad(pixels, 1)).resize((height, height), Image.Resampling.BICUBIC)
        alpha = np.asarray(cell, np.float32) / 255
        alpha = np.clip(alpha / max(alpha.max(), 1e-6) * 1.6 - 0.3, 0, 1)  # a clear edge at half the grey levels
        for _ in range(_TRIES):
            top, left = random.integers(_SIZE - height + 1, size=2)
            place = np.s_[top : top + height, left : left + height]
            if not taken[place].any():
                break
        else:
            continue
        taken[place] = True
        mean = canvas[place].mean((0, 1))
        ink = np.where(mean.mean() < 128, random.uniform(160, 255, 3), random.uniform(0, 95, 3))
        canvas[place] += alpha[..., None] * (ink - canvas[place])
        mask = np.zeros((_SIZE, _SIZE), np.uint8)
        mask[place] = alpha > 0.5
        objects.append((label, mask))
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8), objects


def _texture(random: np.random.Generator) -> np.ndarray:
    """A background: coloured noise at three scales around a base colour."""
    canvas = np.broadcast_to(random.uniform(50, 205, 3), (_SIZE, _SIZE, 3)).astype(np.float32)
    for cells in (4, 16, 80):
        noise = random.normal(0, random.uniform(4, 24), (cells, cells, 3)).astype(np.float32)
        bands = [
            Image.fromarray(band).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC) for band in noise.transpose(2, 0, 1)
        ]
        canvas = canvas + np.stack([np.asarray(band) for band in bands], axis=2)
    return canvas


def _annotate(mask: np.ndarray) -> Dict[str, Any]:
    """COCO's description of a mask: run lengths, area, and the tight box as x, y, width and height."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask))
    return dict(
        segmentation=dict(size=encoded['size'], counts=encoded['counts'].decode()),
        area=int(mask.sum()),
        bbox=[int(side) for side in coco_mask.toBbox(encoded)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m timm_depla.data.scenes', description=__doc__.splitlines()[0])
    parser.add_argument('folder', metavar='DIR', help='folder to write')
    args = parser.parse_args()
    try:
        if any(Path(args.folder).glob('*')) and not Path(args.folder, 'annotations').is_dir():
            raise ConfigError(f"'{args.folder}' holds something else, which would be replaced: name a new folder")
        print(scenes_folder(args.folder))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
