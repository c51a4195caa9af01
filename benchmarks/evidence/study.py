"""Trains the arms, each learning rate and seed once: what is on record is not trained again."""

import csv
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional

import torch

from timm_depla.data import digits_folder
from timm_depla.engine.classification import train as classification
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args, updated
from timm_depla.engine.detection import train as detection
from timm_depla.engine.detection.flags import create_detection_parser
from timm_depla.hub.record import create_record

from .arms import ARMS
from .proxies import PROXIES

RECORDS = Path(__file__).with_name('records.jsonl')  # a line a run
RATES = (0.001, 0.003, 0.009, 0.027, 0.081, 0.243, 0.729, 2.187)  # each arm uses its best
FIRST_RATES = {'adamw': (1, 4), 'sgd': (3, 6), 'scenes': (2, 5)}  # slice to try; extended while the best is at its end
TUNING_SEEDS = (100, 101, 102)  # to choose the learning rate; the first alone in detection


class Job(NamedTuple):
    """A network to train."""

    data: str  # of PROXIES; 'scenes' in detection
    arm: str
    seed: int
    lr: float

    @property
    def command(self) -> str:
        return f'python -m benchmarks.evidence train {self.data} {self.arm} --seed {self.seed} --lr {self.lr}'


def load(job: Job, records: Optional[Path] = None) -> Optional[Dict[str, Any]]:
    """A run's record, the newest if there are more."""
    return _index(records or RECORDS).get(job)


def _index(path: Path) -> Dict[Job, Dict[str, Any]]:
    runs = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return {Job(run.get('data', 'digits'), run['arm'], run['seed'], run['lr']): run for run in runs}


def save(run: Dict[str, Any]) -> None:
    """Add a run to the records."""
    with RECORDS.open('a') as file:
        file.write(json.dumps(run) + '\n')


def metric(arm: str) -> str:
    """What the arm's learning rate is chosen by."""
    return 'eval_top1' if ARMS[arm].task == 'classification' else 'eval_AP'


def tuning(data: str, arm: str) -> Dict[float, Optional[float]]:
    """Mean over the tuning seeds at each learning rate that an arm is to try, None until all are on record."""
    low, high = FIRST_RATES['scenes' if data == 'scenes' else 'sgd' if 'sgd' in ARMS[arm].flags else 'adamw']
    known = _index(RECORDS)
    while True:
        found = {}
        for rate in RATES[low:high]:
            runs = [known.get(job) for job in tuning_jobs(data, arm, rate)]
            found[rate] = None if None in runs else statistics.mean(run['results'][metric(arm)][-1] for run in runs)
        if None in found.values():
            return found
        best = RATES.index(max(found, key=found.__getitem__))
        wider = max(min(low, best - 1), 0), min(max(high, best + 2), len(RATES))
        if wider == (low, high):
            return found
        low, high = wider


def tuning_jobs(data: str, arm: str, rate: float) -> List[Job]:
    return [Job(data, arm, seed, rate) for seed in TUNING_SEEDS[: 1 if data == 'scenes' else None]]


def best_rate(data: str, arm: str) -> Optional[float]:
    """The learning rate with the best mean of the tuning seeds, once all have been tried."""
    found = tuning(data, ARMS[arm].rate_of or arm)
    return None if None in found.values() else max(found, key=found.__getitem__)


def final_jobs(data: str, arm: str) -> List[Job]:
    """The runs of an arm that count; empty until its learning rate is chosen."""
    rate = best_rate(data, arm)
    return [] if rate is None else [Job(data, arm, seed, rate) for seed in range(ARMS[arm].seeds)]


def train(job: Job, device: str = 'cpu') -> Dict[str, Any]:
    """Train an arm and record it. The caller sets the number of threads, which changes the rounding of sums."""
    with tempfile.TemporaryDirectory() as output:
        rows = _fit(job, Path(output), device)
    results = {
        key: [float(row[key]) for row in rows if row[key]]
        for key in rows[-1]
        if key == 'train_loss' or key.startswith('eval_')
    }
    more = job._asdict() if device == 'cpu' else {**job._asdict(), 'gpu': torch.cuda.get_device_name(device)}
    entry = create_record(_command(job, device), results, **more)
    save(entry)
    return entry


def _command(job: Job, device: str) -> str:
    return job.command if device == 'cpu' else f'{job.command} --device {device}'


def _fit(job: Job, output: Path, device: str) -> List[Dict[str, str]]:
    """Train an arm into the folder `run` of an output folder; returns the rows of its summary."""
    arm = ARMS[job.arm]
    flags = ['--model', arm.model, '--seed', str(job.seed), '--device', device, '--workers', '0', '--lr', str(job.lr)]
    kwargs = arm.kwargs
    if arm.trunk:
        flags += ['--initial-checkpoint', str(_trunk(job, device))]
    if arm.task == 'classification':
        flags += PROXIES[job.data].flags()
        kwargs = {**kwargs, **(PROXIES[job.data].kwargs if arm.model.startswith('narrow_resnet') else {})}
        parser, engine = create_train_parser(), classification
    else:
        flags += ['--recipe', 'scenes', '--val-interval', '8']
        flags += [] if device == 'cpu' else ['--no-deterministic']  # each process would compile a RoI align
        parser, engine = create_detection_parser(), detection
    args = parse_args(parser, [*flags, *arm.flags, '--output', str(output), '--experiment', 'run'])
    args = updated(args, model_kwargs={**args.model_kwargs, **kwargs})
    if code := engine.train(args):  # stopped by a signal
        raise SystemExit(code)
    return list(csv.DictReader((output / 'run' / 'summary.csv').read_text().splitlines()))


def _trunk(job: Job, device: str) -> Path:
    """The run of the arm that a job starts from, in the cache; trained if it is not there."""
    arm = ARMS[job.arm].trunk
    if (rate := best_rate(job.data, arm)) is None:
        raise SystemExit(f'{job.arm} starts from {arm}: python -m benchmarks.evidence run {job.data} {arm}')
    trunk = Job(job.data, arm, job.seed, rate)
    recipes = b''.join(path.read_bytes() for path in sorted(Path(__file__).parent.glob('*.yaml')))
    version = hashlib.sha256(recipes).hexdigest()[:12]  # other recipes have other trunks
    folder = digits_folder().parent / 'trunks' / '-'.join(map(str, (*trunk, version)))
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as output:
            _fit(trunk, Path(output), device)
            with suppress(OSError):  # another process was faster
                Path(output, 'run').rename(folder)
    return folder


def _run(job: Job, device: str) -> None:
    """Train in a new process, unless there is a record; its output is shown only if it fails."""
    if load(job) is not None:
        return
    command, environment = _command(job, device), {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{command} failed:\n{done.stderr[-3000:]}')
    print(f'{command}: {load(job)["results"][metric(job.arm)][-1]:.2f}', flush=True)


def run(data: str, arms: Iterable[str], jobs: int, device: str = 'cpu') -> None:
    """Train arms, `jobs` networks at a time: first the tuning runs, then those that count, seed by seed."""
    arms, fit = list(arms), partial(_run, device=device)
    with ThreadPoolExecutor(jobs) as pool:
        while missing := [
            job
            for arm in dict.fromkeys(ARMS[arm].rate_of or arm for arm in arms)
            for rate, found in tuning(data, arm).items()
            if found is None
            for job in tuning_jobs(data, arm, rate)
        ]:
            list(pool.map(fit, missing))
        final = [job for arm in arms for job in final_jobs(data, arm)]
        list(pool.map(fit, sorted(final, key=lambda job: job.seed)))
