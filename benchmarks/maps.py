"""The maps of trained networks: entropy, coverage and peak of each group's, over the digits' validation set.

An entropy of 1 is a uniform map, 0 a single position; coverage is the share of positions where a group's maps are above
the uniform one. A peak is the strongest position over the uniform one, of ROI maps or of the heatmap; a group places
from 1.5 on. It counts as uniform above an entropy of 0.99, and as dead where its strength (what it puts back, times how
unevenly) is below a hundredth of the strongest group's.
"""

import argparse
from pathlib import Path
from typing import Any, Dict

import torch

from timm_depla.data import digits_folder
from timm_depla.visualize import load_any, render_summary, summarize

WEIGHTS = Path(__file__).parent.parent / 'hub' / 'weights'


def add_args(parser: argparse.ArgumentParser) -> None:
    names = sorted(folder.name for folder in WEIGHTS.iterdir())
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
