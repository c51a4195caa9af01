"""Maps of the trained networks: entropy, coverage and peak of each group over the digits' validation set.

The entropy is 1 for a uniform map and 0 for a single position. Coverage is the share of positions where the mean of a
group's maps is above uniform. A peak is a map's maximum over the uniform value: a block's median over the groups. A
group is dead if norm of its vector times contrast of its heatmap is below a hundredth of the strongest group's.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any, Dict

from timm_depla.data import digits_folder
from timm_depla.visualize import DEAD, load_any, summarize

from .record import table

WEIGHTS = Path(__file__).parent.parent / 'hub' / 'weights'
NAMES = sorted(folder.name for folder in WEIGHTS.glob('*.digits'))
FLAGS = dict(weights=dict(nargs='+', default=NAMES, help='folders of hub/weights'))


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
    rows = []
    for name, blocks in results['models'].items():
        row = [f'`{name}`']
        for key in ('entropy', 'coverage'):
            values = [value for block in blocks.values() for value in block[key]]
            row.append(f'{min(values):.3f} to {max(values):.3f}')
        for key in ('map_peak', 'heatmap_peak'):
            row.append(' '.join(f'{statistics.median(block[key]):.1f}' for block in blocks.values()))
        strengths = [(value, max(block['strength'])) for block in blocks.values() for value in block['strength']]
        dead = sum(value < DEAD * most for value, most in strengths)
        rows.append([*row, f'{dead} of {len(strengths)}'])
    header = ['', 'entropy of the groups', 'coverage', 'peaks of the ROI maps', 'of the heatmaps', 'dead groups']
    return f'{results["images"]} images.\n\n{table(header, rows)}'
