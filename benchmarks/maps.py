"""Maps of trained networks: entropy, coverage and peak of each group over the digits' validation set.

The entropy is 1 for a uniform map and 0 for a single position. Coverage is the share of positions where the mean of a
group's maps is above uniform. The peak of its ROI maps or heatmap is the maximum divided by the uniform value; a group
with a peak of at least 1.5 places. A group is uniform above an entropy of 0.99, and dead if its strength (norm of its
back-filled vector times contrast of its heatmap) is below a hundredth of the strongest group's.
"""

import argparse
from pathlib import Path
from typing import Any, Dict

import torch

from timm_depla.data import digits_folder
from timm_depla.visualize import load_any, render_summary, summarize

WEIGHTS = Path(__file__).parent.parent / 'hub' / 'weights'


def add_args(parser: argparse.ArgumentParser) -> None:
    names = sorted(folder.name for folder in WEIGHTS.glob('*.digits'))
    parser.add_argument('--weights', nargs='+', default=names, help='folders of hub/weights')


def run(args: argparse.Namespace) -> Dict[str, Any]:
    files = sorted((digits_folder() / 'validation').glob('*/*.png'))
    results: Dict[str, Any] = dict(images=len(files), models={})
    for name in args.weights:
        totals = summarize(load_any(f'local-dir:{WEIGHTS / name}'), files)
        results['models'][name] = {
            block: {key: value.tolist() for key, value in values.items()} for block, values in totals.items()
        }
    return results


def render(results: Dict[str, Any]) -> str:
    parts = [f'{results["images"]} images.']
    for name, blocks in results['models'].items():
        totals = {b: {key: torch.tensor(value) for key, value in values.items()} for b, values in blocks.items()}
        parts += [f'`{name}`:', render_summary(totals).strip()]
    return '\n\n'.join(parts)
