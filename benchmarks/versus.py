"""timm's train.py and ours on the embedded digits: the same flags, seeds in turn.

timm's script, which its wheel has not, is given by its path. The top-1 is that of the last epoch. Images a second are
those of training and validation, from the first epoch's row in summary.csv to the last one's.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

from timm_depla.data import digits_folder

from .pairs import mean_text, ratio_text, score_cells
from .record import ROOT, read_summary, table

COMMON = (
    '--model test_resnet --num-classes 10 --img-size 64 --crop-pct 1 --batch-size 64 --workers 1 --device cpu --lr 0.1 '
    '--warmup-epochs 1 --sched-on-updates --weight-decay 1e-4 --hflip 0 --color-jitter 0 --scale 0.8 1'
)
IMAGES = 1797  # of both splits
FLAGS = dict(script=dict(help="timm's train.py"), epochs=3, seed=list(range(15)))


def _train(command: List[str], epochs: int) -> Tuple[float, float]:
    """Top-1 after the last epoch, and images a second from the first epoch's row to the last one's."""
    with tempfile.TemporaryDirectory() as output:
        folder, ends = Path(output, 'run'), []
        command = [sys.executable, *command, '--output', output, '--experiment', 'run', '--epochs', str(epochs)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while len(ends) < epochs and process.poll() is None:
                ends += [time.perf_counter()] * (len(read_summary(folder)) - len(ends))
                time.sleep(0.01)
        if process.returncode:
            raise SystemExit(f'failed: {" ".join(command)}')
        top1 = float(read_summary(folder)[-1]['eval_top1'])
    return round(top1, 3), round((epochs - 1) * IMAGES / (ends[-1] - ends[0]), 1)


def run(args: argparse.Namespace) -> Dict[str, Any]:
    digest = hashlib.sha256(Path(args.script).read_bytes()).hexdigest()
    results: Dict[str, Any] = {'timm': [], 'ours': [], 'epochs': args.epochs, 'sha256': digest}
    scripts = {'timm': [args.script], 'ours': [str(ROOT / 'train.py'), '--recipe', 'timm']}
    for number, seed in enumerate(args.seed):
        for name in list(scripts)[:: 1 if number % 2 else -1]:
            flags = [*scripts[name], '--data-dir', str(digits_folder()), *COMMON.split(), '--seed', str(seed)]
            results[name].append(_train(flags, args.epochs))
            print(name, seed, *results[name][-1], flush=True)
    return results


def _compare(results: Dict[str, Any]) -> Tuple[str, str]:
    """What ours has over timm's: points of top-1, and times its speed."""
    pairs = list(zip(results['ours'], results['timm'], strict=True))
    gain = mean_text([ours[0] - timm[0] for ours, timm in pairs])
    return gain, ratio_text([[ours[1], timm[1]] for ours, timm in pairs])


def render(results: Dict[str, Any]) -> str:
    rows = []
    for name in ('timm', 'ours'):
        scores, rates = zip(*results[name], strict=True)
        rows.append([name, *score_cells(scores), f'{statistics.median(rates):.0f}'])
    gain, speed = _compare(results)
    return (
        f'After {results["epochs"]} epochs, ours has {gain} points; it trains {speed} times as fast. The SHA-256 of '
        f"timm's script is {results['sha256'][:12]}; both had `{COMMON}`.\n\n"
        + table(['run', 'top-1 of each seed', 'mean', 'images a second'], rows)
    )


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    return [('speed of train.py', _compare(results)[1], f"timm's train.py, {len(results['ours'])} seeds")]
