"""One real digit or garment somewhere in an image, amid texture and fragments of others.

Training images are made of the training images of their source alone. Each image is drawn from a generator that its
split and number seed, and the object's height evenly on a logarithmic scale.
"""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import numpy as np
from PIL import Image

from timm_depla.data import digits_folder

from .fashion import garments

Source = Tuple[int, np.ndarray]  # class, square of grey levels


def _digits(is_training: bool) -> List[Source]:
    paths = sorted((digits_folder() / ('train' if is_training else 'validation')).glob('*/*.png'))
    return [(int(path.parent.name), np.asarray(Image.open(path))) for path in paths]


@dataclass(frozen=True)
class Scatter:
    """What the images of a set are made of.

    Args:
        sources: The digits or garments of a split.
        size: Height and width of an image, in pixels.
        heights: The smallest and the largest object, in pixels.
        fragments: Parts of other objects in each image, at most half as high as theirs.
        images: Images in each split.
        is_lit: Whether contrast, brightness and sign differ from image to image, as light does.
    """

    sources: Callable[[bool], List[Source]]
    size: int
    heights: Tuple[int, int]
    fragments: int
    images: Dict[str, int]
    is_lit: bool = False


SETS = {
    'digits': Scatter(_digits, 64, (10, 48), 4, {'train': 6000, 'validation': 4000}),
    'garments': Scatter(garments, 48, (12, 40), 8, {'train': 100000, 'validation': 10000}, is_lit=True),
}


def cached(name: str) -> Path:
    """The folder of a set, beside the digits in the cache; another version of this file has another."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = digits_folder().parent / f'scattered-{name}-{version}'
    write(folder, SETS[name])
    return folder


def write(folder: Path, scatter: Scatter) -> None:
    """Write FOLDER/SPLIT/CLASS/*.png, as many of each class, unless it is there."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for number, (split, count) in enumerate(scatter.images.items()):
            sources = scatter.sources(split == 'train')
            everything = [pixels for _, pixels in sources]
            by_class = [[pixels for label, pixels in sources if label == wanted] for wanted in range(10)]
            for index in range(count):
                label = index % 10
                pixels = draw(np.random.default_rng((number, index)), scatter, everything, by_class[label])
                path = Path(scratch, folder.name, split, str(label), f'{index:05d}.png')
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        try:
            Path(scratch, folder.name).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def draw(random: np.random.Generator, scatter: Scatter, others: List[np.ndarray], own: List[np.ndarray]) -> np.ndarray:
    """An image of one of `own` amid fragments of `others`, (size, size) grey levels."""
    canvas = _resize(random.integers(0, 60, (8, 8), dtype=np.uint8), scatter.size)
    for _ in range(scatter.fragments):
        pixels = others[random.integers(len(others))]
        whole = _resize(pixels, _draw_height(random, scatter))
        side = random.integers(len(whole) // 4, len(whole) // 2 + 1)
        top, left = random.integers(len(whole) - side + 1, size=2)
        _paste(random, canvas, whole[top : top + side, left : left + side])
    _paste(random, canvas, _resize(own[random.integers(len(own))], _draw_height(random, scatter)))
    if scatter.is_lit:
        contrast = random.uniform(0.2, 1.0) * random.choice((-1, 1))
        low = random.uniform(max(0, -255 * contrast), min(255, 255 - 255 * contrast))
        canvas = (low + contrast * canvas).round().astype(np.uint8)
    return canvas


def _draw_height(random: np.random.Generator, scatter: Scatter) -> int:
    return round(np.exp(random.uniform(*np.log(scatter.heights))))


def _resize(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def _paste(random: np.random.Generator, canvas: np.ndarray, pixels: np.ndarray) -> None:
    """Bright ink somewhere on the canvas."""
    top, left = random.integers(len(canvas) - len(pixels) + 1, size=2)
    place = canvas[top : top + len(pixels), left : left + len(pixels)]
    np.maximum(place, pixels, out=place)
