"""The training loop of classifiers and detectors: epochs, steps, checkpoints, signals, and resuming."""

import json
import logging
import time
from argparse import Namespace
from contextlib import nullcontext
from typing import Any, Callable, Dict

import torch
from timm.utils import dispatch_clip_grad, distribute_bn

from timm_depla.data import Draw, UnreadableError, seed_position
from timm_depla.errors import ConfigError, DivergedError, TrainingError, UserError

from .batches import explain_worker
from .checkpoint import TIMES, write_file
from .device import autocast, set_up_device
from .distributed import Interrupt, World, explain_lost_peers, setup_world
from .optimizer import DIVERGED, find_resume, open_folder, rejoin
from .plan import describe
from .progress import Report, check_loggers
from .run import Losses, Run

__all__ = ['run_epoch', 'train', 'train_one_epoch']

_logger = logging.getLogger(__name__)


def take_step(run: Run, images: Any, targets: Any) -> torch.Tensor:
    """Forward, backward and, at the end of an accumulation window, the update; returns the loss."""
    args, accumulate = run.args, run.args.grad_accum_steps
    first = run.step - run.step % accumulate
    window = min(accumulate, len(run.loader) - first)
    is_update = run.step + 1 == first + window
    seed_position(args.seed, run.epoch, run.step, Draw.MODEL, run.world.rank)
    with nullcontext() if is_update else run.task.no_sync():
        with autocast(args):
            loss = run.task(images, targets)['loss']
        parameters = run.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
        if run.scaler is not None:
            clip = dict(clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters)
            run.scaler(loss / window, run.optimizer, need_update=is_update, **clip)
        else:
            (loss / window).backward()
            if is_update:
                if args.clip_grad is not None:
                    dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
                run.optimizer.step()
    run.step += 1
    if is_update:
        run.optimizer.zero_grad()
        updates = run.epoch * run.updates_per_epoch + first // accumulate + 1
        if run.ema is not None:
            run.ema.update(run.model, step=updates)
        run.scheduler.step_update(num_updates=updates)
    return loss


def train_one_epoch(run: Run, interrupt: Interrupt, report: Report) -> int:
    """Train to the end of the epoch, or until a signal; returns the signal, 0 for none.

    Raises:
        TrainingError: If a loss is not finite, too many images cannot be read, or a checkpoint cannot be written.
    """
    args, loader, steps = run.args, run.loader, len(run.loader)
    run.task.get_trainable_module().train()
    saved = last = time.monotonic()
    for images, targets in loader.epoch(run.epoch, run.step):
        epoch, step, lr = run.epoch, run.step, run.optimizer.param_groups[0]['lr']
        run.rate = lr

        def where(epoch: int = epoch, step: int = step, lr: float = lr) -> str:
            files = ', '.join(loader.files(epoch, step)[:8])
            return (
                f'at epoch {epoch}, step {step}, learning rate {lr:.3g}: lower --lr or set --clip-grad'
                f'{f". The batch begins with {files}" if files else ""}'
            )

        run.losses.add(take_step(run, images, targets), len(images), where)
        now = time.monotonic()
        run.seconds, last = run.seconds + now - last, now
        report.update(run.step, run.losses.mean, lr)
        loader.unreadable.collect()
        run.writer.poll()
        if run.step % args.grad_accum_steps and run.step < steps:
            continue
        late = args.checkpoint_minutes and time.monotonic() - saved > 60 * args.checkpoint_minutes
        due = late or (args.recovery_interval and run.step % args.recovery_interval == 0)
        wanted = run.world.all_reduce_max(interrupt.signal or int(bool(due)))  # 1: save; above: a signal
        if run.step == steps:
            break
        if wanted > 1:
            return wanted
        if wanted:
            run.save()
            saved = time.monotonic()
    if run.step < steps:
        raise TrainingError(
            f'epoch {run.epoch} ended after {run.step} of {steps} steps: the data has fewer images than '
            '--train-num-samples says, or some cannot be read'
        )
    run.losses.flush()
    if run.world.size > 1 and args.dist_bn:
        distribute_bn(run.model, run.world.size, args.dist_bn == 'reduce')
        if run.ema is not None:
            distribute_bn(run.ema.module, run.world.size, args.dist_bn == 'reduce')
    return run.world.all_reduce_max(interrupt.signal)


def end_epoch(run: Run, metrics: Dict[str, float]) -> None:
    """Add the epoch's row to the history, and move the schedule and the position to the next epoch."""
    total, count = run.world.all_reduce_sum(run.losses.total, run.losses.count)
    row = {'epoch': run.epoch, 'train_loss': total / max(count, 1)}
    row.update({f'eval_{key}': value for key, value in metrics.items() if key != 'count'})
    images = len(run.loader) * run.args.batch_size * run.world.size
    times = zip(TIMES, (round(run.seconds, 3), round(images / max(run.seconds, 1e-3), 1)), strict=True)
    run.history.append({**row, 'lr': run.rate, **dict(times)})
    run.scheduler.step(run.epoch + 1, metrics.get(run.args.eval_metric))
    run.epoch, run.step, run.seconds, run.losses = run.epoch + 1, 0, 0.0, Losses()


def run_epoch(run: Run, interrupt: Interrupt, report: Report) -> int:
    """Train to the end of the epoch, validate and save; returns the signal that interrupted it, 0 for none."""
    args, done = run.args, run.epoch + 1
    is_last = done == run.end
    report.start(run.epoch, run.step)
    signal = 0
    if run.step < len(run.loader):
        signal = train_one_epoch(run, interrupt, report)
    report.stop()
    metrics: Dict[str, float] = {}
    if not signal and not is_last:
        run.loader.prepare(done)
    if not signal and (done % args.val_interval == 0 or is_last or done in args.save_epochs):
        metrics = run.validate(interrupt)
        signal = run.world.all_reduce_max(interrupt.signal)
    if not signal:
        end_epoch(run, metrics)
        report.epoch_ended(run)
    run.save()
    return signal


def train_epochs(run: Run, report: Report) -> int:
    """Train until the end or a signal; returns the signal, 0 for none.

    Raises:
        TrainingError: If training cannot continue.
    """
    signal = 0
    with Interrupt(run.world) as interrupt:
        try:
            try:
                while run.epoch < run.end and not signal:
                    signal = run_epoch(run, interrupt, report)
                run.loader.unreadable.collect(wait=True)
                run.val_loader.unreadable.collect(wait=True)
            finally:
                run.writer.wait()
        except Exception as error:
            report.stop()
            if isinstance(error, DivergedError) and run.world.is_primary:
                write_file(run.folder / DIVERGED, (json.dumps({'epoch': run.epoch}) + '\n').encode())
            raise explained(error) from error
    return signal


def explained(error: Exception) -> Exception:
    """The error, or one that says in a sentence why data loading, or a norm, failed."""
    if isinstance(error, UnreadableError) or 'DataLoader worker' in str(error):
        return TrainingError(explain_worker(error))
    if 'more than 1 value per channel' in str(error):
        return TrainingError('a norm sees one value per channel in a batch: raise --batch-size or the image size')
    return error


def try_batches(run: Run) -> None:
    """Load a batch of each split.

    Raises:
        TrainingError: If one cannot be loaded.
    """
    try:
        next(iter(run.loader.epoch(0))), next(iter(run.val_loader))
    except Exception as error:
        raise explained(error) from error


def train(args: Namespace, build: Callable[[Namespace, World, bool], Run]) -> int:
    """Train; returns the exit code: 0, or 128 + the signal that interrupted it.

    Args:
        args: The run's arguments.
        build: Builds the run from the arguments, the processes, and whether to load initial weights.

    Writes to `args.output`/`args.experiment`: args.yaml (the effective configuration), checkpoints/ with the links best
    and last, summary.csv (a row an epoch) and curves.png.

    Raises:
        ConfigError: If an argument, or a file that it names, is invalid.
        TrainingError: If training cannot continue.
    """
    world = setup_world(args.device)
    set_up_device(args, world)
    check_loggers(args)
    args, checkpoint = find_resume(args, world)
    try:
        run = build(args, world, checkpoint is None)
        plan = describe(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        _logger.debug('setting up', exc_info=True)
        cause = f'{type(error).__name__}: {error}'
        raise ConfigError(f'cannot set up the training, since arguments do not go together ({cause})') from error
    if world.is_primary:
        print(plan, flush=True)
    if args.dry_run:
        try_batches(run)
        return 0
    is_changed = checkpoint is not None and run.load(checkpoint)
    if checkpoint is not None:
        _logger.info('going on from %s: epoch %d, step %d', checkpoint, run.epoch, run.step)
    with open_folder(run, checkpoint is not None), explain_lost_peers(world):
        report = Report(run)
        if checkpoint is not None:
            rejoin(run, is_changed)
        signal = train_epochs(run, report)
        report.ended(run, signal)
    return 128 + signal if signal else 0
