"""One garment somewhere in an image, amid texture and fragments of others."""

from dataclasses import dataclass
from typing import Callable, Dict, List, Tuple

import numpy as np

from .drawn import resize


@dataclass(frozen=True)
class Scattered:
    """Images of one object, whose height is drawn evenly on a logarithmic scale.

    Args:
        sources: The garments of a split, squares of grey levels by class.
        size: Height and width of an image, in pixels.
        heights: The smallest and the largest object, in pixels.
        fragments: Parts of other objects in each image, at most half as high as theirs.
        images: Images in each split.
        is_lit: Whether contrast, brightness and sign differ from image to image, as light does.
    """

    sources: Callable[[bool], List[List[np.ndarray]]]
    size: int
    heights: Tuple[int, int]
    fragments: int
    images: Dict[str, int]
    is_lit: bool = False
    classes: int = 10

    def draw(self, random: np.random.Generator, is_training: bool, label: int) -> np.ndarray:
        sources = self.sources(is_training)
        canvas = resize(random.integers(0, 60, (8, 8), dtype=np.uint8), self.size)
        for _ in range(self.fragments):
            whole = self._object(random, sources[random.integers(self.classes)])
            side = random.integers(len(whole) // 4, len(whole) // 2 + 1)
            top, left = random.integers(len(whole) - side + 1, size=2)
            _paste(random, canvas, whole[top : top + side, left : left + side])
        _paste(random, canvas, self._object(random, sources[label]))
        if self.is_lit:
            contrast = random.uniform(0.2, 1.0) * random.choice((-1, 1))
            low = random.uniform(max(0, -255 * contrast), min(255, 255 - 255 * contrast))
            canvas = (low + contrast * canvas).round().astype(np.uint8)
        return canvas

    def _object(self, random: np.random.Generator, sources: List[np.ndarray]) -> np.ndarray:
        pixels = sources[random.integers(len(sources))]
        return resize(pixels, round(np.exp(random.uniform(*np.log(self.heights)))))


def _paste(random: np.random.Generator, canvas: np.ndarray, pixels: np.ndarray) -> None:
    """Bright ink somewhere on the canvas."""
    top, left = random.integers(len(canvas) - len(pixels) + 1, size=2)
    place = canvas[top : top + len(pixels), left : left + len(pixels)]
    np.maximum(place, pixels, out=place)
