"""Two outlines of random shapes, as in the Synthetic Visual Reasoning Test (Fleuret et al., PNAS 2011)."""

from dataclasses import dataclass
from typing import Dict

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels, height and width of an image


@dataclass(frozen=True)
class Shapes:
    """A class of yes and one of no.

    Args:
        images: Images in each split.
        question: 'same', whether one shape is the other moved, or 'inside', whether one is in the other.
    """

    images: Dict[str, int]
    question: str
    classes: int = 2

    def draw(self, random: np.random.Generator, is_training: bool, label: int) -> np.ndarray:
        radii = (11, 11) if self.question == 'same' else (20, 5)
        first = _shape(random)
        outlines = [first, first if self.question == 'same' and label else _shape(random)]
        is_inside = bool(label) and self.question == 'inside'
        while True:
            centres = [random.uniform(radius + 1, SIZE - radius - 1, 2) for radius in radii]
            lines = [outline * radius + at for outline, radius, at in zip(outlines, radii, centres, strict=True)]
            image = Image.new('L', (SIZE, SIZE))
            ImageDraw.Draw(image).polygon([*map(tuple, lines[0])], fill=255)
            covered = np.asarray(image)[tuple(lines[1].round().astype(int).T[::-1])] > 0
            is_apart = np.abs(centres[0] - centres[1]).max() > sum(radii) + 3
            if covered.all() if is_inside else is_apart:
                break
        image = Image.new('L', (SIZE, SIZE))
        for line in lines:
            ImageDraw.Draw(image).polygon([*map(tuple, line)], outline=255)
        return np.asarray(image)


def _shape(random: np.random.Generator) -> np.ndarray:
    """A closed curve around the origin, (40, 2), whose greatest coordinate is 1."""
    angles, waves = np.linspace(0, 2 * np.pi, 40, endpoint=False), np.arange(1, 6)
    sizes, phases = random.normal(size=5) * 0.45 / waves**0.5, random.uniform(0, 2 * np.pi, 5)
    radii = np.exp((sizes * np.cos(np.outer(angles, waves) + phases)).sum(1))
    curve = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    curve -= (curve.max(0) + curve.min(0)) / 2
    return curve / np.abs(curve).max()
