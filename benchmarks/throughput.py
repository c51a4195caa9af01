"""Our training against a plain loop of timm's parts: samples, schedule, accuracy, and images per second.

Both train the digits recipe from the same weights, each in its own process, an epoch in turn; the first does not count.
The plain loop is the least that does what timm's own train.py does, without exact resume and without checks. Each runs
as glibc is, and where it keeps freed memory, as train.py lets it.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple
from unittest.mock import patch

import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter, CheckpointSaver, accuracy

from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.classification.train import build
from timm_depla.engine.config import parse_args
from timm_depla.engine.device import set_up_device
from timm_depla.engine.distributed import Interrupt, World
from timm_depla.engine.progress import Report
from timm_depla.engine.run import Run
from timm_depla.engine.training import run_epoch

from .pairs import KEEP_MEMORY, speed_text
from .record import table

FREEING = ', memory freed'  # of a server that runs as glibc is
Loop = Tuple[Callable[[int], Tuple[float, float]], Callable[[], Tuple[int, List[float]]]]
"""Runs an epoch of a number, for its seconds and top-1; and tells the images and learning rates seen so far."""
PARTS = {'training': 'training', 'epoch': 'training, validation and checkpoint'}
FLAGS = dict(epochs=18, img_size=128)


class PlainLoop:
    """A minimal training loop of timm's parts, for the flags of the recipes `digits` and `better`."""

    def __init__(self, run: Run):
        args, model = run.args, run.model
        self.model = model
        self.images = 0
        self.rates: List[float] = []
        size, cpu = model.pretrained_cfg['input_size'], torch.device('cpu')
        kwargs = dict(batch_size=args.batch_size, num_workers=args.workers, device=cpu)
        mix = None
        if args.mixup:
            mix = FastCollateMixup(args.mixup, label_smoothing=args.smoothing, num_classes=model.num_classes)
        self.loader = create_loader(
            create_dataset('', root=args.data_dir, split='train'), size, is_training=True,
            interpolation=args.train_interpolation, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
            color_jitter=args.color_jitter, auto_augment=args.aa, collate_fn=mix, **kwargs,
        )  # fmt: skip
        val_set = create_dataset('', root=args.data_dir, split='validation')
        self.val_loader = create_loader(val_set, size, crop_pct=args.crop_pct, **kwargs)
        self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
        steps = len(self.loader)
        self.scheduler, _ = create_scheduler_v2(self.optimizer, **scheduler_kwargs(args), updates_per_epoch=steps)
        self.loss_fn = SoftTargetCrossEntropy() if mix else LabelSmoothingCrossEntropy(args.smoothing)
        self.saver = CheckpointSaver(model, self.optimizer, args=args, checkpoint_dir=args.output, max_history=10)

    def run_epoch(self, epoch: int) -> Tuple[float, float]:
        """Train, validate and save; returns the seconds of training and the top-1 accuracy in percent."""
        start = time.perf_counter()
        self.model.train()
        losses = AverageMeter()
        for step, (images, targets) in enumerate(self.loader):
            self.rates.append(self.optimizer.param_groups[0]['lr'])
            self.images += len(images)
            loss = self.loss_fn(self.model(images), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.update(loss.item(), len(images))
            self.scheduler.step_update(epoch * len(self.loader) + step + 1)
        seconds = time.perf_counter() - start
        self.model.eval()
        losses, top1 = AverageMeter(), AverageMeter()
        with torch.no_grad():
            for images, targets in self.val_loader:
                logits = self.model(images)
                losses.update(torch.nn.functional.cross_entropy(logits, targets).item(), len(images))
                top1.update(accuracy(logits, targets)[0].item(), len(images))
        self.saver.save_checkpoint(epoch, metric=top1.avg)
        return seconds, top1.avg


def plan(output: Path, *flags: Any) -> argparse.Namespace:
    """The training arguments of a loop that saves in a folder."""
    output.mkdir(exist_ok=True)
    common = ['--workers', 2, '--device', 'cpu', '--output', output, '--experiment', 'run']
    return parse_args(create_train_parser(), list(map(str, [*common, *flags])))


def start_plain(args: argparse.Namespace) -> Loop:
    plain = PlainLoop(build(args, World(torch.device('cpu'))))
    return plain.run_epoch, lambda: (plain.images, plain.rates)


def start_ours(args: argparse.Namespace) -> Loop:
    """Our loop, set up as in train.py."""
    images: List[int] = []
    rates: List[float] = []
    world = World(torch.device('cpu'))  # without its keeping freed memory
    set_up_device(args, world)
    ours = build(args, world)
    ours.model.register_forward_pre_hook(lambda model, x: images.append(len(x[0]) if model.training else 0))
    ours.state.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]['lr']))
    (ours.folder.path / 'checkpoints').mkdir(parents=True)
    report = Report(ours)

    def epoch(_: int) -> Tuple[float, float]:
        with Interrupt(world) as interrupt:
            run_epoch(ours, interrupt, report)
        ours.folder.wait()
        return ours.state.history[-1]['seconds'], ours.state.history[-1]['eval_top1']

    return epoch, lambda: (sum(images), rates)


def _serve(start: Callable[[], Loop], pipe: Any) -> None:
    """Run an epoch for each number received; loading processes are forked, as those of training are."""
    multiprocessing.set_start_method('fork', force=True)
    epoch, seen = start()
    while (number := pipe.recv()) is not None:
        pipe.send(epoch(number))
    pipe.send(seen())


def race(loops: Dict[str, Callable[[], Loop]], rounds: int) -> Dict[str, Any]:
    """Let loops take turns, each in its own process.

    Returns:
        By name `training`, the seconds of each epoch; `epoch`, those until it answers; `top1`, the last; `seen`.
    """
    spawn, pipes, processes = multiprocessing.get_context('spawn'), {}, []
    results: Dict[str, Any] = {part: {name: [] for name in loops} for part in (*PARTS, 'top1')}
    for name, start in loops.items():
        pipes[name], end = spawn.Pipe()
        processes.append(spawn.Process(target=_serve, args=(start, end)))
        with patch.dict(os.environ):
            for variable in KEEP_MEMORY if name.endswith(FREEING) else ():
                os.environ.pop(variable, None)
            processes[-1].start()
        end.close()  # so that recv raises if the process ends
    for number in range(rounds):
        for name in loops if number % 2 else reversed(loops):
            began = time.perf_counter()
            pipes[name].send(number)
            training, results['top1'][name] = pipes[name].recv()
            results['training'][name].append(training)
            results['epoch'][name].append(time.perf_counter() - began)
        print(number, *(f'{name} {times[-1]:.2f} s' for name, times in results['epoch'].items()), flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    results['seen'] = {name: pipe.recv() for name, pipe in pipes.items()}
    for process in processes:
        process.join()
    return results


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Times of each epoch, and whether both saw as many samples at the same learning rates."""
    flags = ['--recipe', 'digits', '--epochs', args.epochs, '--img-size', args.img_size]
    with tempfile.TemporaryDirectory() as output:
        loops = {
            name + more: partial(start, plan(Path(output, name + more), *flags))
            for more in ('', FREEING)
            for name, start in (('plain', start_plain), ('ours', start_ours))
        }
        results = race(loops, args.epochs)
    seen = results.pop('seen')
    images, rates = ({name: found[i] for name, found in seen.items()} for i in range(2))
    same_rates = all(each == rates['ours'] for each in rates.values())
    return dict(results, images=images, steps=len(rates['ours']), same_rates=same_rates)


def _speed(results: Dict[str, Any], part: str, name: str, base: str) -> str:
    """A loop's throughput over another's, by pairs of epochs."""
    return speed_text(results[part][base][1:], results[part][name][1:])


def render(results: Dict[str, Any]) -> str:
    rows = []
    for name, images in results['images'].items():
        row = [name, images]
        for part in PARTS:
            row += [f'{statistics.median(results[part][name][1:]):.2f}', _speed(results, part, name, 'plain')]
        rows.append([*row, f'{results["top1"][name]:.2f}'])
    header = ['loop', 'images', 'training, s an epoch', 'speed', 'with validation and checkpoint', 'speed', 'top-1']
    same = 'the same' if results['same_rates'] else 'NOT the same'
    return f'Learning rates of the {results["steps"]} steps: {same}.\n\n{table(header, rows)}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    kept = _speed(results, 'training', 'ours', 'ours' + FREEING)
    return [
        ('speed of training', _speed(results, 'training', 'ours', 'plain'), "a plain loop of timm's parts"),
        ('speed of training where glibc keeps freed memory', kept, 'glibc as it is'),
    ]
