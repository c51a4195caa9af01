"""What a training run is going to do, in words."""

import copy
import textwrap
from argparse import Namespace
from typing import Any, List, Sequence

import torch
import torch.nn as nn
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_macs', 'describe', 'learning_rates']


def count_macs(model: nn.Module, size: Sequence[int]) -> int:
    """Multiply-adds of convolutions and matrix products for one image of this size (C, H, W)."""
    model = copy.deepcopy(model).to('meta').eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, *size, device='meta'))
    return counter.get_total_flops() // 2


def learning_rates(args: Namespace, updates_per_epoch: int, epochs: Sequence[float]) -> List[float]:
    """The learning rate at these epochs, before the update there."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=args.lr)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    rates = []
    for epoch in epochs:
        if epoch >= 1:
            scheduler.step(int(epoch))
        scheduler.step_update(round(epoch * updates_per_epoch))
        rates.append(optimizer.param_groups[0]['lr'])
    return rates


def describe(run: Any, loader: Any, val_loader: Any, num_epochs: int) -> str:
    """The plan of a run: model, data, batch, schedule, folder and every argument."""
    args, size = run.args, run.model.pretrained_cfg['input_size']
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    batch, accumulate = args.batch_size * run.world.size, args.grad_accum_steps
    points = sorted({0, args.warmup_epochs / 2, args.warmup_epochs, *(num_epochs * i / 4 for i in range(1, 5))})
    rates = learning_rates(args, run.updates_per_epoch, points)
    val_images = val_loader.unreadable.num_images
    macs = count_macs(run.model, size) / 1e9
    lines = {
        'model': f'{args.model}, {parameters:.2f} M parameters, {macs:.2f} G multiply-adds at {size[1]} x {size[2]}',
        'data': f'{args.dataset} {args.data_dir or ""}'.strip() + f': {run.num_images:,} training and {val_images:,} '
        f'validation images of {args.num_classes:,} classes',
        'batch': f'{run.world.size} process{"es" if run.world.size > 1 else ""} x {args.batch_size} images'
        + (f' x {accumulate} steps accumulated' if accumulate > 1 else '')
        + f' = {batch * accumulate:,} images an update',
        'steps': f'{num_epochs} epochs x {len(loader):,} steps = {num_epochs * len(loader):,} steps',
        'rate': ', '.join(f'{rate:.4g} at epoch {point:g}' for point, rate in zip(points, rates, strict=True)),
        'folder': str(run.folder),
    }  # fmt: skip
    text = [f'{name:7} {line}' for name, line in lines.items()]
    arguments = ' '.join(f'{key}={value!r}' for key, value in sorted(vars(args).items()) if value not in (None, ''))
    return '\n'.join([*text, *textwrap.wrap(arguments, 110, initial_indent='with    ', subsequent_indent=' ' * 8)])
