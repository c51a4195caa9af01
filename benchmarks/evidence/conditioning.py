"""Does DEPLA train at its host's learning rate? The block against its first version, which had one norm."""

import json
import statistics
from pathlib import Path
from typing import List, Optional

from ..record import table
from . import study
from .arms import ARMS

SEEDS = (300, 301, 302)
RECORDS = study.RECORDS.with_name('conditioning.jsonl')
FIRST = study.RECORDS.with_name('first.jsonl')  # runs of the first version, by the same command at commit 56482af
RATES = study.RATES[2:6]
HOSTS = ('base', 'fishnet')


def _mean(arm: str, rate: float, is_first: bool) -> Optional[str]:
    """Mean top-1 over the seeds, and the top-1 of each; None without runs."""
    found = [study.load(study.Job('digits', arm, seed, rate), FIRST if is_first else RECORDS) for seed in SEEDS]
    tops = [run['results']['eval_top1'][-1] for run in found if run]
    return f'{statistics.mean(tops):.2f} ({" ".join(f"{top:.2f}" for top in tops)})' if tops else None


def conditioning() -> str:
    rows: List[List[str]] = []
    for name in ('base', 'depla', 'adaptive', 'kept', 'fishnet', 'fishnet-depla'):
        for is_first in (True, False):
            means = [_mean(name, rate, is_first) for rate in RATES]
            if any(means):
                version = '' if name in HOSTS else ', first version' if is_first else ', as it is'
                rows.append([ARMS[name].label + version, *(mean or '' for mean in means)])
    return table(['', *map(str, RATES)], rows)


def search() -> str:
    """The runs by which the form of the block was chosen; rejected forms are no longer in the code."""
    lines = Path(__file__).with_name('search.jsonl').read_text().splitlines()
    rows = []
    for run in map(json.loads, lines):
        tops = [f'{run[key]:.2f}' for key in ('top1', 'top1_64', 'top1_96')]
        peaks = ' '.join(f'{peak:.1f}' for peak in run['heatmap_peaks'])
        rows.append([run['network'], run['block'], run['lr'], run['seed'], *tops, f'{run["train_loss"]:.3f}', peaks])
    header = ['', 'block', 'rate', 'seed', 'top-1', 'at 64 pixels', 'at 96', 'training loss', 'heatmap peaks']
    return table(header, rows)
