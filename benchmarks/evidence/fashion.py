"""Fashion-MNIST: 60,000 training and 10,000 test images of garments, 28 x 28 grey pixels, ten classes.

Xiao et al., 2017, https://github.com/zalandoresearch/fashion-mnist, MIT licence. Read from Debian's package
dataset-fashion-mnist where it is installed, else downloaded by torchvision.
"""

import gzip
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Dict, List

import numpy as np
from filelock import FileLock
from torchvision.datasets import FashionMNIST

from timm_depla.data import digits_folder


def fashion_folder() -> Path:
    """The `--data-dir` of `--dataset torch/fashion_mnist`, beside the digits in the cache; written if it is not there.

    Raises:
        RuntimeError: If neither the package nor a network is there.
    """
    root = digits_folder().parent / 'fashion'
    with FileLock(root.with_name('.fashion.lock')):
        if len(list(root.glob('FashionMNIST/raw/*-ubyte'))) < 4:
            shutil.rmtree(root, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
                _write(Path(scratch, 'fashion'))
                Path(scratch, 'fashion').rename(root)
    return root


def _write(folder: Path) -> None:
    """Write torchvision's folder of the data, from Debian's package or else the network."""
    raw = folder / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for data in (os.environ.get('XDG_DATA_DIRS') or '/usr/share').split(':'):
        for path in Path(data, 'datasets', 'fashion-mnist').glob('*.gz'):
            (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    try:
        FashionMNIST(str(folder), download=True)  # if the package brought nothing
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f'no Fashion-MNIST: apt install dataset-fashion-mnist ({error})') from error


@cache
def by_class(is_training: bool) -> List[List[np.ndarray]]:
    """By class, the garments of a split, 28 x 28 grey levels."""
    data = FashionMNIST(str(fashion_folder()), train=is_training)
    return [list(data.data[data.targets == label].numpy()) for label in range(10)]


@dataclass(frozen=True)
class Garments:
    """Some of the images of Fashion-MNIST, drawn with replacement."""

    images: Dict[str, int]
    classes: int = 10

    def draw(self, random: np.random.Generator, is_training: bool, label: int) -> np.ndarray:
        garments = by_class(is_training)[label]
        return garments[random.integers(len(garments))]
