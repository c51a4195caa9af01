"""Training that is killed repeatedly ends bit for bit like uninterrupted training.

The runs have everything that is random or has state: the digits with AutoAugment, random erasing, mixup, cutmix,
stochastic depth and a weight average; in detection, digits in scenes with flips, random sizes and a weight average. The
moments take turns: while a checkpoint is written, at any moment, in validation, each by SIGKILL, and by SIGUSR1, after
which training must save and exit by itself. Every fifth kill hits `hub.publish`. A killed run is resumed with another
number of workers until it ends. Its weights, optimizer state, all other state and its summary are then compared with
those of an uninterrupted run. A killed publication is repeated, and its weights, configuration and recipe are compared.
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
from typing import Any, Dict, List, Tuple

from timm_depla.data import digits_folder
from timm_depla.data.scenes import scenes_folder
from timm_depla.files import find_change

from .differences import differences
from .flags import add_flags

ROOT = Path(__file__).parent.parent
COMMON = ' --recovery-interval 3 --model-ema --model-ema-decay 0.9 --log-interval 1 --resume auto'
FLAGS = {
    'classification': '--recipe digits --img-size 32 --batch-size 32 --aa original --reprob 0.3 '
    '--mixup 0.2 --cutmix 0.5 --drop-path 0.2' + COMMON,
    'detection': '--recipe scenes --hflip 0.5 --warmup-epochs 0 --model-kwargs out_channels=16 '
    'min_size=(96,128) max_size=128 anchor_sizes=(8,16,32,64,128) box_batch_size_per_image=32' + COMMON,
}
SCRIPTS = {'classification': ('train.py', digits_folder), 'detection': ('train_detection.py', scenes_folder)}
MOMENTS = ('during a write', 'at any moment', 'in validation', 'by SIGUSR1')
PUBLISHED = ('model.safetensors', 'config.json', 'recipe.yaml')  # record.json has the time that validation took


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--task', default='classification', choices=list(FLAGS), help='what to train')
    parser.add_argument('--kills', type=int, default=30, help='kills in all')
    parser.add_argument('--processes', type=int, default=1, help='processes that train together, by torchrun')
    parser.add_argument('--max-workers', type=int, default=4, help='runs take 0 to this many loading processes in turn')
    add_flags(parser, epochs=4, seed=0)  # the seed of the first kill; the next ones count on


def launch(command: List[Any], log: Path) -> subprocess.Popen:
    """Start Python in a process group of its own, with its output in a file."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with log.open('w') as file:
        command = [sys.executable, *map(str, command)]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT, start_new_session=True)


def start(args: argparse.Namespace, output: Path, name: str, workers: int) -> subprocess.Popen:
    """Start training, its log beside the run."""
    script, folder = SCRIPTS[args.task]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', args.processes]
    command = [*(torchrun if args.processes > 1 else []), ROOT / script, folder(), *FLAGS[args.task].split()]
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


def trainers(process: subprocess.Popen, count: int) -> List[int]:
    """The training processes: the one started, or torchrun's children, by rank."""
    if count == 1:
        return [process.pid]
    return [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]


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
    log, ranks = run.with_suffix('.log'), trainers(process, count)
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
    if publish(run, output).wait():
        raise RuntimeError(output.with_suffix('.log').read_text())
    wrong = [name for name in PUBLISHED if (output / name).read_bytes() != (expected / name).read_bytes()]
    return wrong + [change for change in [find_change(output)] if change]


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Count the kills by what they hit, the runs, and those that ended differently."""
    hits: Dict[str, int] = {}
    positions: List[str] = []
    different: List[str] = []
    runs, kills, published = 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch)
        reference, expected = output / 'reference', output / 'published'
        if start(args, output, 'reference', args.max_workers).wait():
            raise RuntimeError((output / 'reference.log').read_text())
        began = time.monotonic()
        if args.kills >= 5 and publish(reference, expected).wait():  # with fewer, none hits publishing
            raise RuntimeError((output / 'published.log').read_text())
        seconds = time.monotonic() - began
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
                found = re.search(r'resuming from .*: epoch (\d+), step (\d+)', log)
                positions.append(f'{found[1]}:{found[2]}' if found else 'start')
                print(f'{kills:3} kills  {name} from {positions[-1]}  {hit or "ended"}', flush=True)
            runs += 1
            wrong = differences(output / name, reference)
            while not wrong and published < kills // 5 and kills < args.kills:
                kills, published = kills + 1, published + 1
                folder = output / f'published{published}'
                wrong += kill_publishing(output / name, folder, expected, seconds, args.seed + kills)
                wrong += differences(output / name, reference)
                print(f'{kills:3} kills  {name} in publishing', flush=True)
            different += [f'{name}: {", ".join(wrong)}'] if wrong else []
    if published:
        hits['publishing'] = published
    return dict(
        task=args.task, processes=args.processes,
        kills=kills, hits=hits, runs=runs, starts=positions, identical=runs - len(different),
        different=different,
    )  # fmt: skip


def render(results: Dict[str, Any]) -> str:
    task = results.get('task', 'classification').capitalize()
    hits = ', '.join(f'{count} {name}' for name, count in sorted(results['hits'].items()))
    more = ''.join(f'; {text}' for text in results['different'])
    return (
        f'{task}, {results["processes"]} process{"es" if results["processes"] > 1 else ""}: {results["kills"]} kills '
        f'({hits}) over {results["runs"]} runs. {results["identical"]} of {results["runs"]} ended bit for bit like the '
        f'uninterrupted one{more}.'
    )


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    processes = f', {results["processes"]} processes' if results['processes'] > 1 else ''
    on = f'{results["kills"]} kills, {results.get("task", "classification")}{processes}'
    return [('killed runs that end bit for bit', f'{results["identical"]} of {results["runs"]}', on)]
