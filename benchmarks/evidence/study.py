"""Trains the variants, each learning rate and seed once: what is on record is not trained again."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch

from timm_depla.engine.classification import train as classification
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args, updated
from timm_depla.engine.detection import train as detection
from timm_depla.engine.detection.flags import create_detection_parser
from timm_depla.hub.record import create_record

from ..record import read_summary
from .instruments import INSTRUMENTS
from .maps import draw_maps
from .variants import VARIANTS

RECORDS = Path(__file__).with_name('records.jsonl')  # a line a network, with the results of each rate and seed
RATES = (0.001, 0.003, 0.009, 0.027, 0.081, 0.243, 0.729, 2.187)  # each variant uses its best


class Job(NamedTuple):
    """A network to train."""

    data: str  # of INSTRUMENTS
    variant: str
    seed: int
    lr: float

    def command(self, device: str = 'cpu') -> str:
        command = f'python -m benchmarks.evidence train {self.data} {self.variant} --lr {self.lr} --seed {self.seed}'
        return command if device == 'cpu' else f'{command} --device {device}'


def _lines() -> List[Dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.is_file() else []


def _index() -> Dict[Job, Dict[str, Any]]:
    return {
        Job(line['data'], line['variant'], int(seed), float(rate)): {**line, 'results': results}
        for line in _lines()
        for rate, seeds in line['results'].items()
        for seed, results in seeds.items()
    }


def load(job: Job) -> Optional[Dict[str, Any]]:
    """A run's record, the newest if there are more."""
    return _index().get(job)


def save(run: Dict[str, Any]) -> None:
    """Add a run to the records."""
    line = {**run, 'results': {run['lr']: {run['seed']: run['results']}}}
    del line['lr'], line['seed']
    with RECORDS.open('a') as file:
        file.write(json.dumps(line) + '\n')


def compact() -> None:
    """Put the runs of a network on one line where all but rate and seed is the same."""
    lines: Dict[str, Dict[str, Any]] = {}
    for each in _lines():
        for rate, seeds in each.pop('results').items():
            lines.setdefault(json.dumps(each), {}).setdefault(rate, {}).update(seeds)
    text = ''.join(json.dumps({**json.loads(each), 'results': results}) + '\n' for each, results in lines.items())
    RECORDS.write_text(text)


def score(run: Dict[str, Any], metric: str = 'AP') -> float:
    """What a variant is judged by at the end of a run, in percent: top-1, or a detector's box AP or other `metric`."""
    results = run['results']
    return results['eval_top1'][-1] if 'eval_top1' in results else 100 * results[f'eval_{metric}'][-1]


def tuning(data: str, variant: str) -> Dict[float, Optional[float]]:
    """Mean over the tuning seeds at each learning rate that a variant is to try, None until all are on record."""
    rates, known = INSTRUMENTS[data].rates, _index()
    low, high = RATES.index(rates[0]), RATES.index(rates[-1]) + 1
    while True:
        found = {}
        for rate in RATES[low:high]:
            runs = [known.get(job) for job in tuning_jobs(data, variant, rate)]
            found[rate] = None if None in runs else statistics.mean(map(score, runs))
        if None in found.values():
            return found
        best = RATES.index(max(found, key=found.__getitem__))
        wider = max(min(low, best - 1), 0), min(max(high, best + 2), len(RATES))
        if wider == (low, high):
            return found
        low, high = wider


def tuning_jobs(data: str, variant: str, rate: float) -> List[Job]:
    return [Job(data, variant, seed, rate) for seed in INSTRUMENTS[data].tuning_seeds]


def best_rate(data: str, variant: str) -> Optional[float]:
    """The learning rate with the best mean of the tuning seeds, once all have been tried."""
    found = tuning(data, VARIANTS[variant].rate_of or variant)
    return None if None in found.values() else max(found, key=found.__getitem__)


def final_jobs(data: str, variant: str) -> List[Job]:
    """The runs of a variant that count; empty until its learning rate is chosen."""
    rate = best_rate(data, variant)
    return [] if rate is None else [Job(data, variant, seed, rate) for seed in INSTRUMENTS[data].seeds]


def fit(job: Job, output: str, device: str = 'cpu') -> Dict[str, List[float]]:
    """Train a network in the run folder `output`/run, and return its losses and metrics by epoch.

    The caller sets the number of threads, which changes the rounding of sums.
    """
    variant, instrument = VARIANTS[job.variant], INSTRUMENTS[job.data]
    flags = [*instrument.flags(job.data), '--model', variant.model, '--seed', str(job.seed), '--device', device]
    flags += ['--workers', '0', '--lr', str(job.lr), '--output', output, '--experiment', 'run', *variant.flags]
    if variant.is_detector:
        flags += [] if device == 'cpu' else ['--no-deterministic']  # each process would compile a RoI align
        parser, engine = create_detection_parser(), detection
    else:
        parser, engine = create_train_parser(), classification
    args = parse_args(parser, flags)
    args = updated(args, model_kwargs={**args.model_kwargs, **instrument.model_kwargs(variant)})
    if code := engine.train(args):  # stopped by a signal
        raise SystemExit(code)
    rows = read_summary(Path(output, 'run'))
    return {
        key: [float(row[key]) for row in rows if row[key]]
        for key in rows[-1]
        if key == 'train_loss' or key.startswith('eval_')
    }


def train(job: Job, device: str = 'cpu', figure: Optional[Path] = None) -> Dict[str, Any]:
    """Train a network and record it; with `figure`, measure its DEPLA maps, and draw those of an image."""
    with tempfile.TemporaryDirectory() as output:
        results: Dict[str, Any] = fit(job, output, device)
        if figure is not None:
            results['maps'] = draw_maps(job.data, Path(output, 'run'), figure)
    gpu = {} if device == 'cpu' else {'gpu': torch.cuda.get_device_name(device)}
    entry = create_record(job._replace(seed='SEED', lr='RATE').command(device), results, **job._asdict(), **gpu)
    save(entry)
    return entry


def _run(job: Job, device: str) -> None:
    """Train in a new process, unless there is a record; its output is shown only if it fails."""
    if load(job) is not None:
        return
    command, environment = job.command(device), {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{command} failed:\n{done.stderr[-3000:]}')
    print(f'{command}: {score(load(job)):.2f}', flush=True)


def run(data: str, variants: Sequence[str], jobs: int, device: str = 'cpu') -> None:
    """Train variants, `jobs` networks at a time: first the tuning runs, then those that count, seed by seed."""
    fit_one = partial(_run, device=device)
    with ThreadPoolExecutor(jobs) as pool:
        while missing := [
            job
            for variant in dict.fromkeys(VARIANTS[variant].rate_of or variant for variant in variants)
            for rate, found in tuning(data, variant).items()
            if found is None
            for job in tuning_jobs(data, variant, rate)
        ]:
            list(pool.map(fit_one, missing))
        final = [job for variant in variants for job in final_jobs(data, variant)]
        list(pool.map(fit_one, sorted(final, key=lambda job: job.seed)))
