"""The plan of a training run as text."""

import textwrap
from argparse import Namespace
from typing import Any, Dict, List, Sequence

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_depla.errors import ConfigError
from timm_depla.files import escape

from .config import parse_args, updated
from .optimizer import learning_rate

RATE = ('lr', 'lr_base', 'lr_base_size', 'lr_base_scale', 'opt')


def learning_rates(args: Namespace, updates_per_epoch: int, epochs: Sequence[float]) -> List[float]:
    """The learning rate of the next update at each of these epochs, which may be fractional."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=args.lr)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    rates = []
    for epoch in epochs:
        if epoch >= 1:
            scheduler.step(int(epoch))
        scheduler.step_update(round(epoch * updates_per_epoch))
        rates.append(optimizer.param_groups[0]['lr'])
    return rates


def _recipe_of(run: Any) -> Dict[str, Any]:
    """The arguments that the run's recipe sets; none if its file is gone."""
    argv = ['--recipe', run.args.recipe] if run.args.recipe else []
    try:
        return {**vars(parse_args(run.create_parser(), argv)), 'recipe': None}
    except ConfigError:
        return {}


def describe(run: Any) -> str:
    """The plan of a run: model, data, batch, schedule, folder and arguments.

    The arguments are those that differ from the recipe's, and all of them under `--dry-run`.
    """
    args, world, steps, epochs = run.args, run.world, len(run.loader), run.num_epochs
    batch = f'{world.size} process{"es" if world.size > 1 else ""} x {args.batch_size} images'
    if args.grad_accum_steps > 1:
        batch += f' x {args.grad_accum_steps} steps accumulated'
    images = args.batch_size * world.size * args.grad_accum_steps
    points = sorted({0, args.warmup_epochs / 2, args.warmup_epochs, *(epochs * i / 4 for i in range(1, 5))})
    rates = learning_rates(args, run.updates_per_epoch, points)
    rate = ', '.join(f'{rate:.4g} at epoch {point:g}' for point, rate in zip(points, rates, strict=True))
    if recipe := _recipe_of(run):
        ratio = args.lr / learning_rate(updated(args, **{key: recipe.get(key) for key in RATE}), world.size)
        if not 0.99 < ratio < 1.01:
            rate += f' ({ratio:,.4g} times the {"recipe" if args.recipe else "default"})'
    precision = args.amp_dtype if args.amp else 'float32'
    lines = {
        **run.subject(),
        'batch': f'{batch} = {images:,} images an update',
        'steps': f'{epochs} epochs x {steps:,} steps = {epochs * steps:,} steps',
        'rate': rate,
        'device': f'{world.device}, {torch.get_num_threads()} threads, {precision}, optimizer {args.opt}',
        'folder': str(run.folder.path),
    }
    text = [f'{name:7} {escape(line)}' for name, line in lines.items()]
    told = {key: value for key, value in sorted(vars(args).items()) if args.dry_run or recipe.get(key) != value}
    arguments = ' '.join(f'{key}={value!r}' for key, value in told.items() if value not in (None, ''))
    return '\n'.join([*text, *textwrap.wrap(arguments, 110, initial_indent='with    ', subsequent_indent=' ' * 8)])
