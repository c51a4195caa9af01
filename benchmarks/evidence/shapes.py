"""Two outlines of random shapes, as in the Synthetic Visual Reasoning Test (Fleuret et al., PNAS 2011)."""

from dataclasses import dataclass
from typing import Dict

import numpy as np
from PIL import Image, ImageDraw

SIZE, RADIUS = 48, 8  # pixels: side of an image, and the greatest extent of a shape from its centre


@dataclass(frozen=True)
class Shapes:
    """Is one shape the other, moved? A class of no and one of yes, with this many images in each split."""

    images: Dict[str, int]
    classes: int = 2

    def draw(self, random: np.random.Generator, is_training: bool, label: int) -> np.ndarray:
        first = _shape(random)
        outlines = first, first if label else _shape(random)
        while True:
            centres = [random.uniform(RADIUS + 1, SIZE - RADIUS - 1, 2) for _ in outlines]
            if np.abs(centres[0] - centres[1]).max() > 2 * RADIUS + 3:
                break
        image = Image.new('L', (SIZE, SIZE))
        for outline, centre in zip(outlines, centres, strict=True):
            ImageDraw.Draw(image).polygon([*map(tuple, outline * RADIUS + centre)], outline=255)
        return np.asarray(image)


def _shape(random: np.random.Generator) -> np.ndarray:
    """A closed curve around the origin, (40, 2), whose greatest coordinate is 1."""
    angles, waves = np.linspace(0, 2 * np.pi, 40, endpoint=False), np.arange(1, 6)
    sizes, phases = random.normal(size=5) * 0.45 / waves**0.5, random.uniform(0, 2 * np.pi, 5)
    radii = np.exp((sizes * np.cos(np.outer(angles, waves) + phases)).sum(1))
    curve = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    curve -= (curve.max(0) + curve.min(0)) / 2
    return curve / np.abs(curve).max()
