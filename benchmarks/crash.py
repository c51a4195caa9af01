"""Training that is killed repeatedly ends bit for bit like uninterrupted training.

The runs use a shortened recipe with everything that is random or has state: for classification, the digits with
AutoAugment, random erasing, mixup, cutmix, stochastic depth and a weight average; for detection, digits in scenes with
flips, random image sizes and a weight average. Each run is killed (SIGKILL) at random moments, every third time while a
checkpoint is being written. It is resumed with `--resume auto` and another number of workers until it ends. Then its
weights, optimizer state, all other state and summary are compared with those of an uninterrupted run.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List

from timm_depla.data import digits_folder
from timm_depla.data.scenes import scenes_folder
from timm_depla.engine.checkpoint import differences

from .record import table

ROOT = Path(__file__).parent.parent
COMMON = ' --recovery-interval 3 --model-ema --model-ema-decay 0.9 --log-interval 1 --resume auto'
FLAGS = {
    'classification': '--recipe digits --epochs 4 --img-size 32 --batch-size 32 --aa original --reprob 0.3 '
    '--mixup 0.2 --cutmix 0.5 --drop-path 0.2' + COMMON,
    'detection': '--recipe scenes --epochs 1 --hflip 0.5 --warmup-epochs 0 --model-kwargs out_channels=16 '
    'min_size=(96,128) max_size=128 anchor_sizes=(8,16,32,64,128) box_batch_size_per_image=32' + COMMON,
}
SCRIPTS = {'classification': ('train.py', digits_folder), 'detection': ('train_detection.py', scenes_folder)}


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--task', default='classification', choices=list(FLAGS), help='what to train')
    parser.add_argument('--kills', type=int, default=30, help='kills in all')
    parser.add_argument('--processes', type=int, default=1, help='processes that train together, by torchrun')
    parser.add_argument('--max-workers', type=int, default=4, help='runs take 0 to this many loading processes in turn')
    parser.add_argument('--seed', type=int, default=0, help='seed of the first kill; the next ones count on')


def start(args: argparse.Namespace, output: Path, name: str, workers: int) -> subprocess.Popen:
    """Start training in its own process group, with its log beside the run folder."""
    script, folder = SCRIPTS[args.task]
    command = [sys.executable]
    if args.processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(args.processes)]
    command += [str(ROOT / script), str(folder()), *FLAGS[args.task].split(), '--workers', str(workers)]
    command += ['--output', str(output), '--experiment', name]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with (output / f'{name}.log').open('w') as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def end(process: subprocess.Popen, processes: List[int]) -> None:
    """Kill the remaining processes of a run; torchrun's children have their own sessions."""
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def trainers(process: subprocess.Popen, count: int) -> List[int]:
    """The training processes: the one started, or torchrun's children, by rank."""
    if count == 1:
        return [process.pid]
    return [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]


def kill(process: subprocess.Popen, count: int, run: Path, seed: int) -> str:
    """Wait until a moment drawn from the seed and kill; returns what was hit, or '' if the run ended first."""
    draw = random.Random(seed)
    log, scratch = run.with_suffix('.log'), run / 'checkpoints'
    while process.poll() is None and 'epoch' not in log.read_text():  # the first line of training
        time.sleep(0.02)
    moment = time.monotonic() + draw.uniform(0, 5)
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.005)
    during_write = seed % 3 == 0
    while process.poll() is None and during_write and not list(scratch.glob('.*.part')):
        pass
    if process.poll() is not None:
        return ''
    ranks = trainers(process, count)
    hit = [ranks, ranks[:1], ranks[1:] or ranks][seed // 3 % 3]
    for pid in hit:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)  # surviving ranks go on meanwhile
    end(process, ranks)
    name = f'rank {ranks.index(hit[0])}' if len(hit) < count else 'all ranks' if count > 1 else 'the process'
    return f'{name} {"during a write" if during_write else "at any moment"}'


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Count the kills by what they hit, the runs, and those that ended differently."""
    hits: Dict[str, int] = {}
    positions: List[str] = []
    different: List[str] = []
    runs, kills = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch)
        if start(args, output, 'reference', args.max_workers).wait():
            raise RuntimeError((output / 'reference.log').read_text())
        while kills < args.kills:
            name, ended = f'run{runs}', False
            while not ended:
                seed = args.seed + kills
                process = start(args, output, name, seed % (args.max_workers + 1))
                hit = kill(process, args.processes, output / name, seed) if kills < args.kills else ''
                if hit:
                    kills += 1
                    hits[hit] = hits.get(hit, 0) + 1
                ended = process.wait() == 0
                log = (output / f'{name}.log').read_text()
                if not (hit or ended):
                    raise RuntimeError(log)
                found = re.search(r'going on from .*: epoch (\d+), step (\d+)', log)
                positions.append(f'{found[1]}:{found[2]}' if found else 'start')
                print(f'{kills:3} kills  {name} from {positions[-1]}  {hit or "ended"}', flush=True)
            runs += 1
            wrong = differences(output / name, output / 'reference')
            different += [f'{name}: {", ".join(wrong)}'] if wrong else []
    return dict(
        task=args.task, processes=args.processes,
        kills=kills, hits=hits, runs=runs, starts=positions, identical=runs - len(different),
        different=different,
    )  # fmt: skip


def render(results: Dict[str, Any]) -> str:
    rows = [[name, count] for name, count in sorted(results['hits'].items())]
    task = results.get('task', 'classification').capitalize()
    return (
        f'{task}: {results["kills"]} kills of {results["processes"]} process{"es" if results["processes"] > 1 else ""} '
        f'over {results["runs"]} runs: {results["identical"]} of {results["runs"]} runs ended bit for bit like the '
        f'uninterrupted one{"".join(f"; {text}" for text in results["different"])}.\n\n'
        + table(['killed', 'times'], rows)
    )
