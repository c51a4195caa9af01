"""Trains the arms, each learning rate and seed once: what is on record is not trained again."""

import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

from timm_depla.engine.classification import train as classification
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args, updated
from timm_depla.engine.detection import train as detection
from timm_depla.engine.detection.flags import create_detection_parser
from timm_depla.engine.record import create_record

from . import scattered
from .arms import ARMS

RECIPE = Path(__file__).with_name('scattered.yaml')
RECORDS = Path(__file__).with_name('records.jsonl')  # a line a run
# Learning rates of the classifiers; each arm uses its best.
RATES = (0.001, 0.003, 0.009, 0.027, 0.081, 0.243)
FIRST_RATES = (1, 4)  # slice that every arm tries; extended while the best is at its end
TUNING_SEED = 100  # to choose the learning rate
SEEDS = {'classification': (0, 1, 2, 3, 4), 'detection': (0, 1, 2)}

Job = Tuple[str, int, Optional[float]]  # arm, seed, learning rate


def load(job: Job, records: Optional[Path] = None) -> Optional[Dict[str, Any]]:
    """A run's record, the newest if there are more."""
    path = records or RECORDS
    runs = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return next((run for run in reversed(list(runs)) if (run['arm'], run['seed'], run['lr']) == job), None)


def save(run: Dict[str, Any]) -> None:
    """Add a run to the records."""
    with RECORDS.open('a') as file:
        file.write(json.dumps(run) + '\n')


def tuning(arm: str) -> Dict[float, Optional[float]]:
    """Top-1 of the tuning seed at each learning rate that an arm is to try, None where it is not on record yet."""
    low, high = FIRST_RATES
    while True:
        tops = {}
        for rate in RATES[low:high]:
            run = load((arm, TUNING_SEED, rate))
            tops[rate] = run and run['results']['eval_top1'][-1]
        if None in tops.values():
            return tops
        best = RATES.index(max(tops, key=tops.__getitem__))
        wider = max(min(low, best - 1), 0), min(max(high, best + 2), len(RATES))
        if wider == (low, high):
            return tops
        low, high = wider


def best_rate(arm: str) -> Optional[float]:
    """The learning rate with the best top-1 of the tuning seed, once all have been tried."""
    tops = tuning(ARMS[arm].rate_of or arm)
    return None if None in tops.values() else max(tops, key=tops.__getitem__)


def final_jobs(arm: str) -> List[Job]:
    """The final runs of an arm; empty until its learning rate is chosen."""
    task = ARMS[arm].task
    rate = best_rate(arm) if task == 'classification' else None
    return [] if task == 'classification' and rate is None else [(arm, seed, rate) for seed in SEEDS[task]]


def train(job: Job) -> Dict[str, Any]:
    """Train an arm and record it. The caller sets the number of threads, which changes the rounding of sums."""
    name, seed, rate = job
    arm = ARMS[name]
    flags = ['--model', arm.model, '--seed', str(seed), '--device', 'cpu', '--workers', '0']
    if arm.task == 'classification':
        flags += ['--data-dir', str(scattered.cached()), '--recipe', str(RECIPE), '--lr', str(rate)]
        parser, engine = create_train_parser(), classification
    else:
        flags += ['--recipe', 'scenes', '--val-interval', '4']
        parser, engine = create_detection_parser(), detection
    flags += ['--epochs', str(arm.epochs)] if arm.epochs else []
    with tempfile.TemporaryDirectory() as output:
        args = parse_args(parser, [*flags, '--output', output, '--experiment', 'run'])
        args = updated(args, model_kwargs={**args.model_kwargs, **arm.kwargs})
        if code := engine.train(args):  # stopped by a signal
            raise SystemExit(code)
        rows = list(csv.DictReader(Path(output, 'run', 'summary.csv').read_text().splitlines()))
    results = {
        key: [float(row[key]) for row in rows if row[key]]
        for key in rows[-1]
        if key == 'train_loss' or key.startswith('eval_')
    }
    command = f'python -m benchmarks.evidence train {name} --seed {seed}' + (f' --lr {rate}' if rate else '')
    entry = create_record(command, results, arm=name, seed=seed, lr=rate)
    save(entry)
    return entry


def _run(job: Job) -> None:
    """Train in a new process, unless there is a record; its output is shown only if it fails."""
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
    """Train arms, `jobs` networks at a time: first the classifiers' tuning runs, then the final runs."""
    arms = list(arms)
    tuned = dict.fromkeys(ARMS[arm].rate_of or arm for arm in arms if ARMS[arm].task == 'classification')
    with ThreadPoolExecutor(jobs) as pool:
        while missing := [
            (arm, TUNING_SEED, rate) for arm in tuned for rate, top1 in tuning(arm).items() if top1 is None
        ]:
            list(pool.map(_run, missing))
        list(pool.map(_run, [job for arm in arms for job in final_jobs(arm)]))
