"""The embedded data set: scikit-learn's 1,797 real handwritten digits as an image folder.

The images are the test part of the UCI "Optical Recognition of Handwritten Digits" data set: 8 x 8 pixels, 17 grey
levels, 10 classes (https://archive.ics.uci.edu/dataset/80).
"""

import hashlib
import os
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from timm_depla.errors import ConfigError

from .folders import write_once

__all__ = ['digits_folder']

_SHA256 = '2647b186aee6d2b45917eb8937b6b59845de359ab5fe71b96024b7012f97eab9'  # of paths and pixels


def digits_folder(root: Optional[os.PathLike] = None) -> Path:
    """Return the folder of digits, writing it on first use and verifying it afterwards.

    The folder has `train/` (1,438 images) and `validation/` (359), a fixed split stratified by class, each with the
    classes 0 to 9 as folders of 8 x 8 grey-scale PNG files.

    Args:
        root: Where to keep it; `$XDG_CACHE_HOME/timm_depla/digits` (by default under `~/.cache`) when None.

    Raises:
        ConfigError: If it has to be written and cannot be, or scikit-learn is not installed or has other digits.
    """
    return write_once(root, 'digits', lambda folder: _digest(folder) == _SHA256, _write)


def _write(folder: Path) -> None:
    """Write the digits to `folder`; a fifth of each class, drawn with a fixed seed, is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            'the embedded digits need scikit-learn: pip install "timm-depla[digits]", or give a data folder'
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    random = np.random.RandomState(0)
    for label in range(10):
        indices = random.permutation(np.flatnonzero(labels == label))
        for position, index in enumerate(indices):
            split = 'validation' if position < round(len(indices) / 5) else 'train'
            path = folder / split / str(label) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(path)
    if _digest(folder) != _SHA256:
        raise ConfigError('scikit-learn returned other digits than expected; please report its version')


def _digest(folder: Path) -> str:
    """SHA-256 over every file's relative path and decoded pixels, whatever the PNG compression."""
    digest = hashlib.sha256()
    for path in sorted(path for split in ('train', 'validation') for path in (folder / split).rglob('*')):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode())
            try:
                digest.update(np.asarray(Image.open(path)).tobytes())
            except OSError:
                return ''
    return digest.hexdigest()
