"""Every variant trains: the tiny models on the digits, both back-filling networks, temperatures and seeds."""

import argparse
import csv
import itertools
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.classification.train import train
from timm_depla.engine.config import parse_args

from .record import table

EPOCHS = 12  # of the digits recipe's 18: enough to tell


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', nargs='+', default=['test_resnet_depla'], help='models, with or without DEPLA')
    parser.add_argument('--bfn', nargs='+', default=['plain', 'adaptive'], help='back-filling networks')
    parser.add_argument('--temperature', nargs='+', type=float, default=[0.2, 0.5, 1.0], help='temperatures')
    parser.add_argument('--seed', nargs='+', type=int, default=[0, 1, 2], help='seeds')


def _settings(args: argparse.Namespace) -> Iterator[Tuple[str, List[str]]]:
    """Name and arguments of train.py for each variant."""
    for model in args.model:
        if not model.endswith('_depla'):
            yield f'`{model}`', ['--model', model]
            continue
        for bfn, temperature in itertools.product(args.bfn, args.temperature):
            depla = f"depla={{'bfn': '{bfn}', 'temperature': {temperature}}}"
            yield f'`{model}`, {bfn}, T = {temperature}', ['--model', model, '--model-kwargs', depla]


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Best and last validation top-1 of each run of the digits recipe, in percent."""
    results: Dict[str, Any] = {}
    for name, flags in _settings(args):
        for seed in args.seed:
            with tempfile.TemporaryDirectory() as output:
                argv = ['--recipe', 'digits', '--epochs', str(EPOCHS), '--seed', str(seed), *flags]
                train(parse_args(create_train_parser(), [*argv, '--output', output, '--experiment', 'run']))
                rows = list(csv.DictReader((Path(output) / 'run' / 'summary.csv').open()))
            top1 = [round(float(row['eval_top1']), 2) for row in rows]
            results.setdefault(name, []).append(dict(seed=seed, best=max(top1), last=top1[-1]))
            print(name, seed, max(top1), top1[-1], flush=True)
    return results


def render(results: Dict[str, Any]) -> str:
    rows = [
        [name, *(f'{run["best"]:.2f} / {run["last"]:.2f}' for run in runs), f'{min(run["best"] for run in runs):.2f}']
        for name, runs in results.items()
    ]
    seeds = [f'seed {run["seed"]}' for run in next(iter(results.values()))]
    return f'The digits recipe in {EPOCHS} epochs: validation top-1 in percent, best / last.\n\n' + table(
        ['variant', *seeds, 'lowest best'], rows
    )
