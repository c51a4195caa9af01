"""Trains the arms, each learning rate and seed once: what is on record is not trained again."""

import csv
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

from timm_depla.engine import classification, detection
from timm_depla.engine.config import parse_args
from timm_depla.engine.detection_flags import create_detection_parser
from timm_depla.engine.flags import create_train_parser

from .. import record
from . import scattered
from .arms import ARMS

RECIPE = Path(__file__).with_name('scattered.yaml')
RECORDS = Path(__file__).parent / 'records'
RATES = (0.003, 0.009, 0.027)  # learning rates of the classifiers, of which each arm takes its best
TUNING_SEEDS = (100,)  # to choose it by
DETECTION_EPOCHS = 4
SEEDS = {'classification': (0, 1, 2, 3, 4), 'detection': (0, 1, 2)}

Job = Tuple[str, int, Optional[float]]  # arm, seed, learning rate


def _path(job: Job) -> Path:
    arm, seed, rate = job
    return RECORDS / f'{arm}{"" if rate is None else f"-lr{rate}"}-seed{seed}.json'


def load(job: Job) -> Optional[Dict[str, Any]]:
    """A run's record, if there is one."""
    return json.loads(_path(job).read_text()) if _path(job).is_file() else None


def best_rate(arm: str) -> Optional[float]:
    """The learning rate with the best mean over the tuning seeds, once all have been tried."""
    tops = {}
    for rate in RATES:
        runs = [load((arm, seed, rate)) for seed in TUNING_SEEDS]
        if None in runs:
            return None
        tops[rate] = sum(run['results']['eval_top1'][-1] for run in runs)
    return max(tops, key=tops.__getitem__)


def final_jobs(arm: str) -> List[Job]:
    """The runs that count, of an arm whose learning rate is chosen."""
    task = ARMS[arm].task
    rate = best_rate(arm) if task == 'classification' else None
    return [] if task == 'classification' and rate is None else [(arm, seed, rate) for seed in SEEDS[task]]


def train(job: Job) -> Dict[str, Any]:
    """Train an arm and record it; on how many threads, the caller says: the number decides how sums are rounded."""
    name, seed, rate = job
    arm = ARMS[name]
    flags = ['--model', arm.model, '--seed', str(seed), '--device', 'cpu', '--workers', '0']
    if arm.task == 'classification':
        flags += ['--data-dir', str(scattered.cached()), '--recipe', str(RECIPE), '--lr', str(rate)]
        parser, engine = create_train_parser(), classification
    else:
        flags += ['--recipe', 'scenes', '--epochs', str(DETECTION_EPOCHS)]
        parser, engine = create_detection_parser(), detection
    with tempfile.TemporaryDirectory() as output:
        args = parse_args(parser, [*flags, '--output', output, '--experiment', 'run'])
        args.model_kwargs = {**args.model_kwargs, **arm.kwargs}
        if code := engine.train(args):  # stopped by a signal
            raise SystemExit(code)
        rows = list(csv.DictReader(Path(output, 'run', 'summary.csv').read_text().splitlines()))
    results = {
        key: [float(row[key]) for row in rows if row[key]]
        for key in rows[-1]
        if key == 'train_loss' or key.startswith('eval_')
    }
    command = f'python -m benchmarks.evidence train {name} --seed {seed}' + (f' --lr {rate}' if rate else '')
    RECORDS.mkdir(exist_ok=True)
    entry = record.create_record(command, results, arm=name, seed=seed, lr=rate)
    _path(job).write_text(json.dumps(entry, indent=1) + '\n')
    return entry


def _run(job: Job) -> None:
    """Train in a process of its own, unless there is a record; what it says goes nowhere unless it fails."""
    arm, seed, rate = job
    if load(job) is not None:
        return
    command = [sys.executable, '-m', 'benchmarks.evidence', 'train', arm, '--seed', str(seed)]
    command += ['--lr', str(rate)] if rate else []
    done = subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{shlex.join(command)} failed:\n{done.stderr[-3000:]}')
    key = 'eval_top1' if ARMS[arm].task == 'classification' else 'eval_AP'
    print(
        f'{arm}, seed {seed}, learning rate {rate or "of the recipe"}: {key} {load(job)["results"][key][-1]:.2f}',
        flush=True,
    )


def run(arms: Iterable[str], jobs: int) -> None:
    """Train arms, so many at a time: the classifiers' tuning runs first, then the runs that count."""
    arms = list(arms)
    tuned = [arm for arm in arms if ARMS[arm].task == 'classification']
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_run, itertools.product(tuned, TUNING_SEEDS, RATES)))
        list(pool.map(_run, [job for arm in arms for job in final_jobs(arm)]))
