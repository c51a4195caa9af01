"""The training loop of classifiers and detectors: epochs, steps, checkpoints, signals, and resuming."""

import json
import logging
import time
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict

import torch
from timm.utils import dispatch_clip_grad, distribute_bn

from timm_depla.data import Draw, seed_position
from timm_depla.errors import ConfigError, DivergedError, TrainingError, UserError

from .batches import explained
from .checkpoint import DIVERGED, TIMES, checkpoint_name, write_file
from .device import autocast, set_up_device
from .distributed import Interrupt, Interrupted, World, explain_lost_peers, setup_world
from .folder import find_resume
from .plan import describe
from .progress import Report, check_loggers
from .run import Run
from .state import Losses

_logger = logging.getLogger(__name__)


def take_step(run: Run, images: Any, targets: Any) -> torch.Tensor:
    """Forward, backward and, at the end of an accumulation window, the update; returns the loss."""
    args, state, accumulate = run.args, run.state, run.args.grad_accum_steps
    first = state.step - state.step % accumulate
    window = min(accumulate, len(run.loader) - first)
    is_update = state.step + 1 == first + window
    seed_position(args.seed, state.epoch, state.step, Draw.MODEL, run.world.rank)
    with nullcontext() if is_update else state.task.no_sync():
        with autocast(args):
            loss = state.task(images, targets)['loss']
        state.scaler.scale(loss / window).backward()
    state.step += 1
    if is_update:
        if args.clip_grad is not None:
            state.scaler.unscale_(state.optimizer)
            parameters = state.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        state.task.update_ema(step=run.updates)
        state.scheduler.step_update(num_updates=run.updates)
    return loss


def describe_step(loader: Any, epoch: int, step: int, lr: float) -> str:
    """Where a loss is not finite, and what to do."""
    files = ', '.join(loader.files(epoch, step)[:8])
    begin = f'. The batch begins with {files}' if files else ''
    return f'at epoch {epoch}, step {step}, learning rate {lr:.3g}: lower --lr or set --clip-grad{begin}'


def train_one_epoch(run: Run, interrupt: Interrupt, report: Report) -> None:
    """Train to the end of the epoch; a signal raises Interrupted between two updates."""
    args, state, steps = run.args, run.state, len(run.loader)
    state.task.get_trainable_module().train()
    saved = last = time.monotonic()
    for images, targets in run.loader.epoch(state.epoch, state.step):
        state.rate = state.optimizer.param_groups[0]['lr']
        where = partial(describe_step, run.loader, state.epoch, state.step, state.rate)
        state.losses.add(take_step(run, images, targets), len(images), where)
        now = time.monotonic()
        state.seconds, last = state.seconds + now - last, now
        report.update()
        run.loader.unreadable.collect()
        run.folder.wait(is_blocking=False)
        if state.step == steps:
            break
        if state.step % args.grad_accum_steps:
            continue
        is_late = args.checkpoint_minutes and time.monotonic() - saved > 60 * args.checkpoint_minutes
        is_due = is_late or (args.recovery_interval and state.step % args.recovery_interval == 0)
        if interrupt.check(is_due):
            run.save()
            saved = time.monotonic()
    if state.step < steps:
        raise TrainingError(
            f'epoch {state.epoch} ended after {state.step} of {steps} steps: the data has fewer images than '
            '--train-num-samples says, or some cannot be read'
        )
    state.losses.flush()
    if run.world.size > 1 and args.dist_bn:
        for network in state.networks:
            distribute_bn(network, run.world.size, args.dist_bn == 'reduce')
    interrupt.check()


def end_epoch(run: Run, metrics: Dict[str, float]) -> None:
    """Add the epoch's row to the history, and move the schedule and the position to the next epoch."""
    state = run.state
    total, count = run.world.all_reduce(state.losses.total, state.losses.count)
    row = {'epoch': state.epoch, 'train_loss': total / max(count, 1)}
    row.update({f'eval_{key}': value for key, value in metrics.items() if key != 'count'})
    images = len(run.loader) * run.args.batch_size * run.world.size
    times = (round(state.seconds, 3), round(images / max(state.seconds, 1e-3), 1))
    state.history.append({**row, 'lr': state.rate, **dict(zip(TIMES, times, strict=True))})
    state.scheduler.step(state.epoch + 1, metrics.get(run.args.eval_metric))
    state.epoch, state.step, state.seconds, state.losses = state.epoch + 1, 0, 0.0, Losses()


def run_epoch(run: Run, interrupt: Interrupt, report: Report) -> None:
    """Train to the end of the epoch, validate and save; a signal raises Interrupted."""
    args, done = run.args, run.state.epoch + 1
    is_last = done == run.end
    report.start()
    if run.state.step < len(run.loader):
        train_one_epoch(run, interrupt, report)
    report.stop()
    if not is_last:
        run.loader.prepare(done)
    is_validated = done % args.val_interval == 0 or is_last or done in args.save_epochs
    end_epoch(run, run.validate(interrupt) if is_validated else {})
    report.epoch_ended()
    run.save()


def train_epochs(run: Run, report: Report) -> None:
    """Train until the end; a signal raises Interrupted, with a checkpoint saved."""
    with Interrupt(run.world) as interrupt:
        try:
            try:
                while run.state.epoch < run.end:
                    run_epoch(run, interrupt, report)
                run.loader.unreadable.collect(wait=True)
                run.val_loader.unreadable.collect(wait=True)
            except Interrupted:
                run.save()
                raise
            finally:
                run.folder.wait()
        except Exception as error:
            report.stop()
            if isinstance(error, DivergedError) and run.world.is_primary:
                write_file(run.folder.path / DIVERGED, (json.dumps({'epoch': run.state.epoch}) + '\n').encode())
            raise explained(error) from error


def train(args: Namespace, build: Callable[[Namespace, World, bool], Run]) -> int:
    """Train in the folder `args.output`/`args.experiment`; returns the exit code, 0 or 128 + an interrupting signal.

    `build` makes the run from the arguments, the processes, and whether to load initial weights. ConfigError if an
    argument, or a file that it names, is invalid; TrainingError if training cannot continue.
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
        try:
            next(iter(run.loader.epoch(0))), next(iter(run.val_loader))
        except Exception as error:
            raise explained(error) from error
        return 0
    is_changed = checkpoint is not None and run.resume(checkpoint)
    folder = run.folder.open(checkpoint is not None) if world.is_primary else nullcontext()
    with folder, explain_lost_peers(world):
        report = Report(run)
        if checkpoint is not None:
            start = checkpoint_name(run.state.epoch, run.state.step)
            if not world.broadcast(world.is_primary and run.folder.rejoin(start, run.state.history, is_changed)):
                run.save()  # another batch size has moved the position
        try:
            train_epochs(run, report)
        except Interrupted as interruption:
            report.interrupted()
            return 128 + interruption.signal
        report.ended()
    return 0
