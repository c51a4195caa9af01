"""Training that is killed repeatedly ends bit for bit like uninterrupted training.

The runs have everything that is random or has state: augmentation, erasing, mixup, cutmix, stochastic depth, an average
of the weights. Kills are by SIGKILL while a checkpoint is written, at any moment and in validation, and by SIGUSR1,
after which training must save and exit. Every fifth hits `hub.publish`. A killed run is resumed with another number of
workers until it ends, and compared with an uninterrupted one: weights, states, summary, publication.
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
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Tuple

from timm_depla.data import digits_folder
from timm_depla.data.scenes import scenes_folder
from timm_depla.files import find_change

from .differences import differences
from .record import ROOT

COMMON = ' --recovery-interval 3 --model-ema --model-ema-decay 0.9 --log-interval 1 --resume auto'
CLASSIFICATION = '--recipe digits --img-size 32 --batch-size 32 --aa original --reprob 0.3 --mixup 0.2 --cutmix 0.5'
DETECTION = (
    '--recipe scenes --hflip 0.5 --warmup-epochs 0 --model-kwargs out_channels=16 '
    'min_size=(96,128) max_size=128 anchor_sizes=(8,16,32,64,128) box_batch_size_per_image=32'
)
TASKS = {  # the script, its data and flags
    'classification': ('train.py', digits_folder, f'{CLASSIFICATION} --drop-path 0.2{COMMON}'),
    'detection': ('train_detection.py', scenes_folder, DETECTION + COMMON),
}
MOMENTS = ('during a write', 'at any moment', 'in validation', 'by SIGUSR1')
PUBLISHED = ('model.safetensors', 'config.json', 'recipe.yaml')  # record.json has the time that validation took
FLAGS = dict(
    task=dict(default='classification', choices=list(TASKS), help='what to train'),
    kills=dict(type=int, default=30, help='kills in all'),
    processes=dict(type=int, default=1, help='processes that train together, by torchrun'),
    max_workers=dict(type=int, default=4, help='runs take 0 to this many loading processes in turn'),
    epochs=4, seed=0,  # the seed of the first kill; the next ones count on
)  # fmt: skip


def launch(command: List[Any], log: Path) -> subprocess.Popen:
    """Start Python in a process group of its own, with its output in a file."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with log.open('w') as file:
        command = [sys.executable, *map(str, command)]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT, start_new_session=True)


def start(args: argparse.Namespace, output: Path, name: str, workers: int) -> subprocess.Popen:
    """Start training, its log beside the run."""
    script, folder, flags = TASKS[args.task]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', args.processes]
    command = [*(torchrun if args.processes > 1 else []), ROOT / script, folder(), *flags.split()]
    command += ['--epochs', args.epochs, '--workers', workers, '--output', output, '--experiment', name]
    return launch(command, output / f'{name}.log')


def end(process: subprocess.Popen, processes: List[int]) -> None:
    """Kill what is left of a run: torchrun's children have sessions of their own."""
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def succeed(process: subprocess.Popen, log: Path) -> None:
    if process.wait():
        raise RuntimeError(log.read_text())


def await_moment(process: subprocess.Popen, run: Path, moment: str, draw: random.Random) -> None:
    """Wait until the moment has come, or the run has ended."""
    log = run.with_suffix('.log')

    def wait_for(condition: Any, seconds: float = 0.01) -> None:
        while process.poll() is None and not condition():
            time.sleep(seconds)

    wait_for(lambda: re.search(r'^epoch', log.read_text(), re.MULTILINE))  # the first line of training
    if moment == 'in validation':
        steps = int(re.search(r'x ([\d,]+) steps', log.read_text())[1].replace(',', ''))
        last = f'step {steps - 1}/{steps}'
        target = log.read_text().count(last) + draw.randint(1, 2)
        wait_for(lambda: log.read_text().count(last) >= target)
        delay = time.monotonic() + draw.uniform(0.15, 0.45)  # the last step takes about 0.1 s
    else:
        delay = time.monotonic() + draw.uniform(0, 5)
    wait_for(lambda: time.monotonic() > delay)
    if moment == 'during a write':
        wait_for(lambda: list((run / 'checkpoints').glob('.*.part')), 0)


def kill(process: subprocess.Popen, count: int, run: Path, seed: int) -> str:
    """Wait for the seed's moment and kill; returns what was hit, or '' if the run ended before."""
    draw, moment = random.Random(seed), MOMENTS[seed % len(MOMENTS)]
    await_moment(process, run, moment, draw)
    if process.poll() is not None:
        return ''
    log, ranks = run.with_suffix('.log'), [process.pid]
    if count > 1:  # torchrun's children, by rank
        ranks = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    hit = [ranks, ranks[:1], ranks[1:] or ranks][draw.randrange(3)]
    is_signal = moment == 'by SIGUSR1'
    if moment == 'in validation' and 'step' not in log.read_text().strip().splitlines()[-1]:
        moment = 'at any moment'  # validation has ended
    for pid in hit:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1 if is_signal else signal.SIGKILL)
    if is_signal:  # to be answered by all ranks
        code = process.wait(timeout=120)
        if code == 0:
            return ''
        if 'resume with: python' not in log.read_text():
            raise RuntimeError(f'SIGUSR1 was not answered: {log.read_text()}')
    else:
        time.sleep(0.2)  # what a surviving rank does meanwhile
    end(process, ranks)
    name = f'rank {ranks.index(hit[0])}' if len(hit) < count else 'all ranks' if count > 1 else 'the process'
    return f'{name} {moment}'


def publish(run: Path, output: Path) -> subprocess.Popen:
    """Start to publish a run."""
    return launch(['-m', 'hub.publish', run, '--output', output], output.with_suffix('.log'))


def kill_publishing(run: Path, output: Path, expected: Path, seconds: float, seed: int) -> List[str]:
    """Kill a publication at the seed's moment, repeat it, and compare it with the expected one."""
    draw = random.Random(seed)
    moment, is_late = time.monotonic() + draw.uniform(0, seconds), seed // 5 % 2
    process = publish(run, output)
    while process.poll() is None and not (list(output.glob('*')) if is_late else time.monotonic() > moment):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.02) if is_late else 0)
    end(process, [])
    succeed(publish(run, output), output.with_suffix('.log'))
    wrong = [name for name in PUBLISHED if (output / name).read_bytes() != (expected / name).read_bytes()]
    return wrong + [change for change in [find_change(output)] if change]


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Count the kills by what they hit, the runs, and those that ended differently."""
    hits: Counter = Counter()
    different: List[str] = []
    runs = 0
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch)
        reference, expected = output / 'reference', output / 'published'
        succeed(start(args, output, 'reference', args.max_workers), output / 'reference.log')
        began = time.monotonic()
        if args.kills >= 5:  # with fewer, none hits publishing
            succeed(publish(reference, expected), output / 'published.log')
        seconds = time.monotonic() - began
        while hits.total() < args.kills:
            name, ended = f'run{runs}', False
            while not ended:
                seed = args.seed + hits.total()
                process = start(args, output, name, seed % (args.max_workers + 1))
                hit = kill(process, args.processes, output / name, seed) if hits.total() < args.kills else ''
                hits.update([hit] if hit else [])
                ended = process.wait() == 0
                if not (hit or ended):
                    raise RuntimeError((output / f'{name}.log').read_text())
                print(f'{hits.total():3} kills  {name} {hit or "ended"}', flush=True)
            runs += 1
            wrong = differences(output / name, reference)
            while not wrong and hits['publishing'] < hits.total() // 5 and hits.total() < args.kills:
                hits['publishing'] += 1
                folder, seed = output / f'published{hits["publishing"]}', args.seed + hits.total()
                wrong += kill_publishing(output / name, folder, expected, seconds, seed)
                wrong += differences(output / name, reference)
                print(f'{hits.total():3} kills  {name} in publishing', flush=True)
            different += [f'{name}: {", ".join(wrong)}'] if wrong else []
    counts = dict(kills=hits.total(), hits=dict(+hits), runs=runs, identical=runs - len(different))
    return dict(task=args.task, processes=args.processes, **counts, different=different)


def _task(results: Dict[str, Any]) -> str:
    count = results['processes']
    return f'{results.get("task", "classification")}, {count} process{"es" if count > 1 else ""}'


def render(results: Dict[str, Any]) -> str:
    hits = ', '.join(f'{name} {count}' for name, count in sorted(results['hits'].items()))
    more = ''.join(f'; {text}' for text in results['different'])
    return (
        f'In {_task(results)}: {results["kills"]} kills over {results["runs"]} runs ({hits}). {results["identical"]} '
        f'of {results["runs"]} ended bit for bit like the uninterrupted one{more}.'
    )


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    ended, on = f'{results["identical"]} of {results["runs"]}', f'{results["kills"]} kills, {_task(results)}'
    return [('killed runs that ended bit for bit', ended, on)]
