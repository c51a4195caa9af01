"""Scattered digits: one real handwritten digit somewhere in an image, amid texture and fragments of other digits.

An image has 64 x 64 grey pixels. The digit is 10 to 48 pixels high, drawn evenly on a logarithmic scale. The digits of
the training images are those of the embedded data set's `train/`, the others those of its `validation/`. Each image is
drawn from a generator that its split and number seed.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import List, Tuple

import numpy as np
from PIL import Image

from timm_depla.data import digits_folder

SIZE = 64  # pixels, height and width
HEIGHTS = (10, 48)  # of the digit
FRAGMENTS = 4  # of other digits, at difficulty 1
IMAGES = {'train': 6000, 'validation': 4000}

Digit = Tuple[int, np.ndarray]  # class, 8 x 8 grey levels


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='DIR', type=Path, help='folder to write')
    parser.add_argument('--difficulty', type=float, default=1.0, help=f'fragments of other digits, over {FRAGMENTS}')


def cached() -> Path:
    """The folder of the study's images, beside the digits in the cache; another version of this file has another."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = digits_folder().parent / f'scattered-{version}'
    write(folder)
    return folder


def write(folder: Path, difficulty: float = 1.0) -> None:
    """Write FOLDER/SPLIT/CLASS/*.png, as many of each class, unless it is there."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for number, (split, count) in enumerate(IMAGES.items()):
            paths = sorted((digits_folder() / split).glob('*/*.png'))
            digits = [(int(path.parent.name), np.asarray(Image.open(path))) for path in paths]
            for index in range(count):
                label = index % 10
                pixels = draw(np.random.default_rng((number, index)), digits, label, difficulty)
                path = Path(scratch, folder.name, split, str(label), f'{index:05d}.png')
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        try:
            Path(scratch, folder.name).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def draw(random: np.random.Generator, digits: List[Digit], label: int, difficulty: float) -> np.ndarray:
    """An image of a digit of a class, (64, 64) grey levels."""
    canvas = _resize(random.integers(0, 60, (8, 8), dtype=np.uint8), SIZE)
    for _ in range(round(FRAGMENTS * difficulty)):
        _, pixels = digits[random.integers(len(digits))]
        digit = _resize(pixels, _draw_height(random))
        side = random.integers(len(digit) // 4, len(digit) // 2 + 1)  # a quarter of a digit at the most
        top, left = random.integers(len(digit) - side + 1, size=2)
        _paste(random, canvas, digit[top : top + side, left : left + side])
    own = [pixels for digit, pixels in digits if digit == label]
    _paste(random, canvas, _resize(own[random.integers(len(own))], _draw_height(random)))
    return canvas


def _draw_height(random: np.random.Generator) -> int:
    return round(np.exp(random.uniform(*np.log(HEIGHTS))))


def _resize(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def _paste(random: np.random.Generator, canvas: np.ndarray, pixels: np.ndarray) -> None:
    """Bright ink somewhere on the canvas."""
    top, left = random.integers(SIZE - len(pixels) + 1, size=2)
    place = canvas[top : top + len(pixels), left : left + len(pixels)]
    np.maximum(place, pixels, out=place)
