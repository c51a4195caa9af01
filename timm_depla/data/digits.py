"""The embedded data set: scikit-learn's 1,797 real handwritten digits as an image folder.

The images are the test part of the UCI "Optical Recognition of Handwritten Digits" data set: 8 x 8 pixels, 17 grey
levels, 10 classes (https://archive.ics.uci.edu/dataset/80).
"""

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Optional

import numpy as np
from filelock import FileLock
from PIL import Image

__all__ = ['digits_folder']

_logger = logging.getLogger(__name__)

_SHA256 = '2647b186aee6d2b45917eb8937b6b59845de359ab5fe71b96024b7012f97eab9'  # of paths and pixels


def digits_folder(root: Optional[os.PathLike] = None) -> Path:
    """Return the folder of digits, writing it on first use and verifying it afterwards.

    The folder has `train/` (1,438 images) and `validation/` (359), a fixed split stratified by class, each with the
    classes 0 to 9 as folders of 8 x 8 grey-scale PNG files.

    Args:
        root: Where to keep it; `$XDG_CACHE_HOME/timm_depla/digits` (by default under `~/.cache`) when None.

    Raises:
        ModuleNotFoundError: If it has to be written and scikit-learn is not installed.
        RuntimeError: If scikit-learn's digits are not the ones that this package was made for.
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    root = Path(root) if root is not None else cache / 'timm_depla' / 'digits'
    if root.is_dir() and _digest(root) == _SHA256:
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f'.{root.name}.lock')):
        if root.is_dir():
            if _digest(root) == _SHA256:  # another process was faster
                return root
            _logger.warning('%s is incomplete or was changed; writing it again', root)
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            folder = Path(scratch) / root.name
            _write(folder)
            if _digest(folder) != _SHA256:
                raise RuntimeError('scikit-learn returned other digits than expected; please report its version')
            shutil.rmtree(root, ignore_errors=True)
            folder.rename(root)
    return root


def _write(folder: Path) -> None:
    """Write the digits to `folder`; a fifth of each class, drawn with a fixed seed, is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
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


def _digest(folder: Path) -> str:
    """SHA-256 over every file's relative path and decoded pixels, whatever the PNG compression."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob('*')):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode())
            try:
                digest.update(np.asarray(Image.open(path)).tobytes())
            except OSError:
                return ''
    return digest.hexdigest()
