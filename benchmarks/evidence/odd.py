"""Odd one out: the class of an image is that of the one digit in it that has no second of its class."""

from dataclasses import dataclass
from typing import Dict

import numpy as np

from .drawn import digits, resize

GRID, CELL, HEIGHT = 3, 16, 14  # cells along a side, and pixels of a cell and of a digit


@dataclass(frozen=True)
class OddOneOut:
    """Real digits in some of nine cells, 48 x 48 grey levels.

    Args:
        images: Images in each split.
        pairs: Pairs of one class beside the odd digit.
        groups: With 2, bright digits and dark ones, each with an odd one and pairs of their own, often of the classes
            of the other group. The image's class is ten times that of the bright odd digit, plus that of the dark one.
    """

    images: Dict[str, int]
    pairs: int
    groups: int = 1

    @property
    def classes(self) -> int:
        return 10**self.groups

    def draw(self, random: np.random.Generator, is_training: bool, label: int) -> np.ndarray:
        ink = np.zeros((GRID * CELL, GRID * CELL), np.int16)  # bright is positive
        cells = iter(random.permutation(GRID**2))
        for sign, odd in zip((1, -1), divmod(label, 10) if self.groups == 2 else (label,), strict=False):
            pairs = random.choice([each for each in range(10) if each != odd], self.pairs, replace=False)
            for each in (odd, *pairs, *pairs):
                sources = digits(is_training)[each]
                pixels = resize(sources[random.integers(len(sources))], HEIGHT).astype(np.int16)
                top, left = np.multiply(divmod(int(next(cells)), GRID), CELL) + random.integers(
                    CELL - HEIGHT + 1, size=2
                )
                ink[top : top + HEIGHT, left : left + HEIGHT] = sign * pixels
        return np.clip(128 + ink // 2 if self.groups == 2 else ink, 0, 255).astype(np.uint8)
