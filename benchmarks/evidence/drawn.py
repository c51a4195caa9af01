"""Folders of images that are drawn from a seed, FOLDER/SPLIT/CLASS/*.png."""

import hashlib
import inspect
import tempfile
from pathlib import Path
from typing import Dict, Protocol

import numpy as np
from PIL import Image

from timm_depla.data import digits_folder


class Drawn(Protocol):
    """A set of images. Those of training are made of the training images of their source alone."""

    images: Dict[str, int]  # in each split
    classes: int

    def draw(self, random: np.random.Generator, is_training: bool, label: int) -> np.ndarray:
        """An image of the class `label`, grey levels (H, W)."""


def cached(name: str, drawn: Drawn) -> Path:
    """The folder of a set, beside the digits in the cache; another version of its code has another."""
    code = b''.join(Path(path).read_bytes() for path in (__file__, inspect.getfile(type(drawn))))
    folder = digits_folder().parent / f'{name}-{hashlib.sha256(code + repr(drawn).encode()).hexdigest()[:12]}'
    write(folder, drawn)
    return folder


def write(folder: Path, drawn: Drawn) -> None:
    """Write a set with as many images of each class, unless it is there. Split and number seed an image's generator."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for number, (split, count) in enumerate(drawn.images.items()):
            for index in range(count):
                label = index % drawn.classes
                pixels = drawn.draw(np.random.default_rng((number, index)), split == 'train', label)
                path = Path(scratch, folder.name, split, f'{label:02d}', f'{index:06d}.png')
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        try:
            Path(scratch, folder.name).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def resize(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
