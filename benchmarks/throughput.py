"""Our training against a plain loop around timm's loader: samples, schedule, accuracy, and images a second.

Both train the digits recipe from the same weights, an epoch of one and then an epoch of the other. The plain loop is
the least that trains: timm's loader, model, optimizer, schedule and loss, the loss read at every step as timm's own
train.py does, and neither exact resume nor checks.
"""

import argparse
import copy
import statistics
import tempfile
import time
from typing import Any, Dict, List, Tuple

import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter

from timm_depla.engine.classification import build, end_epoch, train_one_epoch
from timm_depla.engine.config import parse_args
from timm_depla.engine.evaluation import evaluate
from timm_depla.engine.flags import create_train_parser
from timm_depla.engine.loaders import find_data
from timm_depla.engine.report import Report, UnreadableImages
from timm_depla.engine.world import Interrupt, setup_world

from .record import table


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--epochs', type=int, default=18, help='epochs of each')
    parser.add_argument('--img-size', type=int, default=128, help='image size in pixels')


class PlainLoop:
    """The least that trains the digits recipe with timm."""

    def __init__(self, args: argparse.Namespace, model: torch.nn.Module):
        self.model = model
        kwargs = dict(interpolation=args.train_interpolation, scale=args.scale, ratio=args.ratio, hflip=args.hflip)
        self.loader = create_loader(
            create_dataset('', root=args.data_dir, split='train'),
            model.pretrained_cfg['input_size'],
            args.batch_size,
            is_training=True,
            color_jitter=args.color_jitter,
            num_workers=args.workers,
            device=torch.device('cpu'),
            **kwargs,
        )
        self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
        steps = len(self.loader)
        self.scheduler, _ = create_scheduler_v2(self.optimizer, **scheduler_kwargs(args), updates_per_epoch=steps)
        self.loss_fn = LabelSmoothingCrossEntropy(args.smoothing)

    def train_epoch(self, epoch: int) -> Tuple[int, List[float]]:
        """Train for an epoch; returns the number of images and the learning rate of each step."""
        self.model.train()
        losses, rates = AverageMeter(), []
        for step, (images, targets) in enumerate(self.loader):
            rates.append(self.optimizer.param_groups[0]['lr'])
            loss = self.loss_fn(self.model(images), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.update(loss.item(), len(images))
            self.scheduler.step_update(epoch * len(self.loader) + step + 1)
        return losses.count, rates


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Times of each epoch, and whether both saw as many samples at the same learning rates."""
    with tempfile.TemporaryDirectory() as output:
        flags = ['--recipe', 'digits', '--epochs', str(args.epochs), '--img-size', str(args.img_size)]
        train_args = parse_args(create_train_parser(), [*flags, '--device', 'cpu', '--output', output])
        train_args.data_dir = find_data(train_args)
        world = setup_world('cpu')
        ours, loader, val_loader, _ = build(train_args, world)
        plain = PlainLoop(train_args, copy.deepcopy(ours.model))
        report = Report(train_args, ours.folder, len(loader), args.epochs, train_args.batch_size, True)
        unreadable = UnreadableImages(loader.dataset.unreadable, loader.num_images, 'train')
        rates: List[float] = []
        ours.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]['lr']))
        seconds: Dict[str, List[float]] = {'plain': [], 'ours': []}
        same = True
        for epoch in range(args.epochs):
            start = time.perf_counter()
            count, plain_rates = plain.train_epoch(epoch)
            seconds['plain'].append(time.perf_counter() - start)
            rates.clear()
            start = time.perf_counter()
            report.start(epoch, 0)
            with Interrupt(world) as interrupt:
                train_one_epoch(ours, loader, interrupt, report, unreadable)
            seconds['ours'].append(time.perf_counter() - start)
            same = same and ours.losses.count == count and rates == plain_rates
            end_epoch(ours, {})
            print(epoch, *(f'{times[-1]:.2f} s' for times in seconds.values()), same, flush=True)
        top1 = {
            name: evaluate(model, val_loader, train_args, world)['top1']
            for name, model in (('plain', plain.model), ('ours', ours.model))
        }
    pairs = [plain / own for plain, own in zip(seconds['plain'][1:], seconds['ours'][1:], strict=True)]
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratios = dict(by_pair=statistics.median(pairs), of_medians=medians['plain'] / medians['ours'])
    return dict(images=count, same_samples_and_rates=same, top1=top1, ratios=ratios, seconds=seconds)


def render(results: Dict[str, Any]) -> str:
    rows = [
        [
            name,
            results['images'],
            f'{statistics.median(results["seconds"][name][1:]):.2f}',
            f'{results["top1"][name]:.2f}',
        ]
        for name in ('plain', 'ours')
    ]
    same = 'the same' if results['same_samples_and_rates'] else 'NOT the same'
    return (
        table(['loop', 'images an epoch', 'seconds an epoch, median', 'top-1 at the end'], rows)
        + f'\n\nNumber of samples and learning rate of every step: {same}. Throughput, ours over plain: '
        f'{results["ratios"]["by_pair"]:.3f} (median over the pairs of epochs), '
        f'{results["ratios"]["of_medians"]:.3f} (ratio of the medians); the first epoch of each is not counted.'
    )
