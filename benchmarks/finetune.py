"""Fine-tuning with DEPLA inserted against fine-tuning without: the recipe `finetune` from the same weights.

timm's `test_convnext` is trained on the embedded digits 0 to 4 and fine-tuned on all ten, alone and with DEPLA
inserted (`backbone_depla`); each seed has its own pretrained weights. The scores are those of the weight average in the
last epoch. The difference is the mean over the pairs, with Student's 95 percent interval. DEPLA adds weights that
train at the full rate, where the host alone has only its classifier: a gain here may be due to more trained parameters
as much as to DEPLA, and there is no control with as many parameters.
"""

import argparse
import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from scipy.stats import ttest_1samp

from timm_depla.data import digits_folder
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.classification.train import train
from timm_depla.engine.config import parse_args

from .record import table

HOST = 'test_convnext'
IMAGES = ['--img-size', '64', '--crop-pct', '1', '--hflip', '0', '--color-jitter', '0', '--scale', '0.8', '1']
BLOCKS = {'modules': ['stages.1.blocks.0', 'stages.1.blocks.1']}  # of 8 x 8 positions
ARMS = {
    'host': ['--model', HOST],
    'host with DEPLA': ['--model', 'backbone_depla', '--model-kwargs', f'backbone={HOST}'],
}


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--epochs', type=int, default=20, help='of fine-tuning')
    parser.add_argument('--seed', nargs='+', type=int, default=[0, 1, 2, 3, 4], help='seeds')


def _train(output: str, name: str, *flags: str) -> List[float]:
    """Validation top-1 of each epoch of a run."""
    argv = [*flags, *IMAGES, '--output', output, '--experiment', name]
    train(parse_args(create_train_parser(), argv))
    rows = csv.DictReader((Path(output) / name / 'summary.csv').open())
    return [round(float(row['eval_top1']), 3) for row in rows]


def _write_half(folder: Path) -> Path:
    """Link the digits 0 to 4 in their own folder."""
    for split in ('train', 'validation'):
        (folder / split).mkdir(parents=True)
        for label in range(5):
            (folder / split / str(label)).symlink_to(digits_folder() / split / str(label))
    return folder


def run(args: argparse.Namespace) -> Dict[str, Any]:
    results: Dict[str, Any] = dict(epochs=args.epochs, pretrained=[], **{arm: [] for arm in ARMS})
    for seed in map(str, args.seed):
        with tempfile.TemporaryDirectory() as output:
            half = str(_write_half(Path(output, 'half')))
            recipe = ['--recipe', 'digits', '--epochs', '8', '--model', HOST, '--opt', 'adamw', '--lr', '0.004']
            results['pretrained'].append(_train(output, 'pretrained', half, *recipe, '--seed', seed)[-1])
            weights = ['--initial-checkpoint', f'{output}/pretrained/best/model.safetensors']
            for arm, model in ARMS.items():
                recipe = [str(digits_folder()), '--recipe', 'finetune', '--epochs', str(args.epochs)]
                results[arm].append(_train(output, arm.replace(' ', ''), *recipe, *model, *weights, '--seed', seed)[-1])
                print(arm, seed, results[arm][-1], flush=True)
    return results


def render(results: Dict[str, Any]) -> str:
    rows = []
    for arm in ARMS:
        scores = results[arm]
        row = [arm, *(f'{score:.2f}' for score in scores), f'{statistics.mean(scores):.2f}', '']
        if arm != 'host':
            gains = [score - host for score, host in zip(scores, results['host'], strict=True)]
            low, high = ttest_1samp(gains, 0).confidence_interval(0.95)
            row[-1] = f'{statistics.mean(gains):+.2f} ({low:+.2f} to {high:+.2f})'
        rows.append(row)
    digits = ', '.join(f'{score:.2f}' for score in results['pretrained'])
    seeds = [f'run {i + 1}' for i in range(len(results['host']))]
    return (
        f'{results["epochs"]} epochs of fine-tuning, validation top-1 in percent; on the five digits the hosts had '
        f'{digits}.\n\n' + table(['', *seeds, 'mean', 'over the host'], rows)
    )
