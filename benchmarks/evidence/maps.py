"""Do the maps of a trained network fall on the objects of its images?"""

from pathlib import Path
from typing import Dict, List

import torch
from torch.nn.functional import adaptive_max_pool2d

from timm_depla.loading import load_model
from timm_depla.visualize import capture, draw_block, read_input

from .drawn import cached
from .instruments import INSTRUMENTS

IMAGES = 200  # of the validation


def draw_maps(data: str, run: Path, figure: Path) -> Dict[str, List[List[float]]]:
    """Draw the last block's maps of an image of a drawn set, and measure all blocks.

    Returns:
        By block, for the groups' ROI maps (their mean over D) and for their heatmaps: how often a position with ink
        counts as much as in a uniform map, the mean over images.
    """
    model = load_model(str(run)).eval()
    files = sorted((cached(data, INSTRUMENTS[data].images) / 'validation').glob('*/*'), key=lambda file: file.name)
    found: Dict[str, List[torch.Tensor]] = {}
    for file in files[:IMAGES]:
        image, x = read_input(model, file)
        blocks = capture(model, x)
        for name, block in blocks.items():
            ink = adaptive_max_pool2d(image[:1], block.heatmaps.shape[2:]) > 0.5  # (1, H, W)
            maps = torch.stack([block.maps[0].mean(1), block.heatmaps[0]])  # (2, L, H, W)
            found.setdefault(name, []).append((maps * ink).sum((2, 3)) / ink.float().mean())
    draw_block(image, block, f'{data}, {name}').savefig(figure, dpi=100)
    return {name: torch.stack(values).mean(0).tolist() for name, values in found.items()}
