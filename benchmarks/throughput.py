"""Our training against a plain loop of timm's parts: samples, schedule, accuracy, and images per second.

Both train the digits recipe from the same weights, each in its own process, and take turns epoch by epoch. An epoch is
training, validation and the checkpoint. The plain loop is the minimum that does what timm's own train.py does: timm's
loaders, model, optimizer, schedule, loss, accuracy and checkpoint saver, without exact resume and without checks.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

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
from timm_depla.engine.distributed import Interrupt, setup_world
from timm_depla.engine.progress import Report
from timm_depla.engine.run import Run
from timm_depla.engine.training import run_epoch

from .record import table

_PARTS = {'training': 'in training', 'epoch': 'with validation and checkpoint'}


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--epochs', type=int, default=18, help='epochs of each')
    parser.add_argument('--img-size', type=int, default=128, help='image size in pixels')


class PlainLoop:
    """A minimal training loop of timm's parts, for the flags of the recipes `digits` and `better`."""

    def __init__(self, run: Run):
        args, model = run.args, run.model
        self.model = model
        self.images = 0
        self.rates: List[float] = []
        self.training_seconds: List[float] = []
        size, cpu = model.pretrained_cfg['input_size'], torch.device('cpu')
        kwargs = dict(batch_size=args.batch_size, num_workers=args.workers, device=cpu)
        mix = None
        if args.mixup:
            mix = FastCollateMixup(args.mixup, label_smoothing=args.smoothing, num_classes=model.num_classes)
        self.loader = create_loader(
            create_dataset('', root=args.data_dir, split='train'),
            size,
            is_training=True,
            interpolation=args.train_interpolation,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            collate_fn=mix,
            **kwargs,
        )
        val_set = create_dataset('', root=args.data_dir, split='validation')
        self.val_loader = create_loader(val_set, size, crop_pct=args.crop_pct, **kwargs)
        self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
        steps = len(self.loader)
        self.scheduler, _ = create_scheduler_v2(self.optimizer, **scheduler_kwargs(args), updates_per_epoch=steps)
        self.loss_fn = SoftTargetCrossEntropy() if mix else LabelSmoothingCrossEntropy(args.smoothing)
        self.saver = CheckpointSaver(model, self.optimizer, args=args, checkpoint_dir=args.output, max_history=10)

    def run_epoch(self, epoch: int) -> float:
        """Train, validate and save; returns the top-1 accuracy in percent."""
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
        self.training_seconds.append(time.perf_counter() - start)
        self.model.eval()
        losses, top1 = AverageMeter(), AverageMeter()
        with torch.no_grad():
            for images, targets in self.val_loader:
                logits = self.model(images)
                losses.update(torch.nn.functional.cross_entropy(logits, targets).item(), len(images))
                top1.update(accuracy(logits, targets)[0].item(), len(images))
        self.saver.save_checkpoint(epoch, metric=top1.avg)
        return top1.avg


class TimedReport(Report):
    """Report that stores the training time of each epoch."""

    training_seconds: List[float] = []

    def stop(self) -> None:
        super().stop()
        self.training_seconds.append(time.perf_counter() - self.start_time)


def compare(plain: List[float], ours: List[float]) -> Dict[str, Any]:
    """Ratios of plain to our times, without the first epoch: above 1 if ours are shorter."""
    pairs = [a / b for a, b in zip(plain[1:], ours[1:], strict=True)]
    medians = [statistics.median(times[1:]) for times in (plain, ours)]
    ratios = dict(by_pair=statistics.median(pairs), of_medians=medians[0] / medians[1])
    return dict(plain=plain, ours=ours, medians=medians, **ratios)


def plan(args: argparse.Namespace, output: str) -> argparse.Namespace:
    """The training arguments of both loops."""
    flags = ['--recipe', 'digits', '--epochs', str(args.epochs), '--img-size', str(args.img_size)]
    flags += ['--device', 'cpu', '--output', output, '--experiment', 'run']
    return parse_args(create_train_parser(), flags)


def serve_plain(train_args: argparse.Namespace, pipe: Any) -> None:
    """Run an epoch of the plain loop for each number received; finally send its images and learning rates."""
    plain = PlainLoop(build(train_args, setup_world('cpu')))
    while (epoch := pipe.recv()) is not None:
        top1 = plain.run_epoch(epoch)
        pipe.send((plain.training_seconds[-1], top1))
    pipe.send((plain.images, plain.rates))


def serve_ours(train_args: argparse.Namespace, pipe: Any) -> None:
    """As `serve_plain`, for our loop, set up as in train.py."""
    images: List[int] = []
    rates: List[float] = []
    world = setup_world('cpu')
    set_up_device(train_args, world)
    ours = build(train_args, world)
    ours.model.register_forward_pre_hook(lambda model, x: images.append(len(x[0]) if model.training else 0))
    ours.state.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]['lr']))
    (ours.folder.path / 'checkpoints').mkdir(parents=True)
    report = TimedReport(ours)
    while pipe.recv() is not None:
        with Interrupt(world) as interrupt:
            run_epoch(ours, interrupt, report)
        ours.folder.wait()
        pipe.send((report.training_seconds[-1], ours.state.history[-1]['eval_top1']))
    pipe.send((sum(images), rates))


def _serve(serve: Callable, train_args: argparse.Namespace, pipe: Any) -> None:
    """Call an arm in its process, whose loading processes are forked, as those of training are."""
    multiprocessing.set_start_method('fork', force=True)
    serve(train_args, pipe)


def race(arms: Dict[str, Tuple[Callable, argparse.Namespace]], rounds: int) -> Dict[str, Any]:
    """Run the arms, each in its own process, alternately round by round.

    Args:
        arms: By name, a function and the arguments of its run. The function gets these and a pipe. For each number
            received, it sends seconds and top-1 accuracy; for None, its images and learning rates.
        rounds: Number of rounds.

    Returns:
        By arm, `training`, the seconds sent in each round; `epoch`, the seconds until each answer; `top1`, the last
        accuracy; `seen`, the images and learning rates.
    """
    spawn, pipes, processes = multiprocessing.get_context('spawn'), {}, []
    results: Dict[str, Any] = {part: {name: [] for name in arms} for part in _PARTS}
    results['top1'] = {}
    for name, (serve, train_args) in arms.items():
        pipes[name], end = spawn.Pipe()
        processes.append(spawn.Process(target=_serve, args=(serve, train_args, end)))
        processes[-1].start()
        end.close()  # so that recv raises if the process ends
    for number in range(rounds):
        for name in arms if number % 2 else reversed(arms):
            start = time.perf_counter()
            pipes[name].send(number)
            training, results['top1'][name] = pipes[name].recv()
            results['training'][name].append(training)
            results['epoch'][name].append(time.perf_counter() - start)
        print(number, *(f'{name} {times[-1]:.2f} s' for name, times in results['epoch'].items()), flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    results['seen'] = {name: pipe.recv() for name, pipe in pipes.items()}
    for process in processes:
        process.join()
    return results


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Times of each epoch, and whether both saw as many samples at the same learning rates."""
    with tempfile.TemporaryDirectory() as output:
        arms = {}
        for name, serve in (('plain', serve_plain), ('ours', serve_ours)):
            (Path(output) / name).mkdir()
            arms[name] = (serve, plan(args, f'{output}/{name}'))
        results = race(arms, args.epochs)
    seen = results['seen']
    return dict(
        images={name: images for name, (images, _) in seen.items()},
        same_rates=seen['plain'][1] == seen['ours'][1],
        steps=len(seen['ours'][1]),
        top1=results['top1'],
        **{part: compare(**results[part]) for part in _PARTS},
    )


def render(results: Dict[str, Any]) -> str:
    rows = []
    for number, name in enumerate(('plain', 'ours')):
        medians = [f'{results[part]["medians"][number]:.2f}' for part in _PARTS]
        rows.append([name, results['images'][name], *medians, f'{results["top1"][name]:.2f}'])
    same = 'the same' if results['same_rates'] else 'NOT the same'
    ratios = [
        f'{results[part]["by_pair"]:.3f} {text} (by pairs of epochs; of the medians {results[part]["of_medians"]:.3f})'
        for part, text in _PARTS.items()
    ]
    header = ['loop', 'training images', 'training, s an epoch', 'with validation and checkpoint', 'last top-1']
    return (
        table(header, rows) + f'\n\nLearning rates of the {results["steps"]} steps: {same}. '
        f'Throughput, ours over plain: {", ".join(ratios)}. Times are medians; the first epoch of each is not counted.'
    )
