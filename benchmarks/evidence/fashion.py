"""Fashion-MNIST: 60,000 training and 10,000 test images of garments, 28 x 28 grey pixels, ten classes.

Xiao et al., 2017, https://github.com/zalandoresearch/fashion-mnist, MIT licence. Read from Debian's package
dataset-fashion-mnist where it is installed, else downloaded by torchvision.
"""

import gzip
import tempfile
from pathlib import Path
from typing import List, Tuple

import numpy as np
from torchvision.datasets import FashionMNIST

from timm_depla.data import digits_folder

DEBIAN = Path('/usr/share/datasets/fashion-mnist')


def fashion_folder() -> Path:
    """The `--data-dir` of `--dataset torch/fashion_mnist`, beside the digits in the cache; written if it is not there.

    Raises:
        RuntimeError: If neither the package nor a network is there.
    """
    root = digits_folder().parent / 'fashion'
    if (root / 'FashionMNIST').is_dir():
        return root
    if not DEBIAN.is_dir():
        try:
            FashionMNIST(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f'no Fashion-MNIST: apt install dataset-fashion-mnist ({error})') from error
        return root
    root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        raw = Path(scratch, 'raw')
        raw.mkdir()
        for path in DEBIAN.glob('*.gz'):
            (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        try:
            Path(scratch).rename(root / 'FashionMNIST')
        except OSError:
            if not (root / 'FashionMNIST').is_dir():  # else another process was faster
                raise
        else:
            Path(scratch).mkdir()  # for the context to remove
    return root


def garments(is_training: bool) -> List[Tuple[int, np.ndarray]]:
    """Each garment's class and 28 x 28 grey levels."""
    data = FashionMNIST(str(fashion_folder()), train=is_training)
    return list(zip(data.targets.tolist(), data.data.numpy(), strict=True))
