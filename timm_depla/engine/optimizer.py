"""Optimizer, schedule and weight average of a run, its folder, and the checkpoint to resume from."""

import io
import logging
import math
import os
import platform
import time
from argparse import Namespace
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

import torch
import torch.nn as nn
import yaml
from filelock import FileLock, Timeout
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, NativeScaler, unwrap_model

from timm_depla.errors import ConfigError, closest
from timm_depla.files import check_own, escape, open_to_append, read_mapping
from timm_depla.layers import Depla
from timm_depla.timm_runs import read_timm_run

from .checkpoint import LINKS, checkpoint_name, find_damage, newest_checkpoint, set_aside, write_file, writing
from .config import updated
from .device import compile_depla
from .distributed import World
from .run import Run

__all__ = [
    'DIVERGED', 'assemble', 'create_optimizer', 'find_resume', 'learning_rate', 'open_folder', 'rejoin',
]  # fmt: skip

_logger = logging.getLogger(__name__)

DIVERGED = 'diverged.json'  # in a run folder, from a loss that is not finite until training resumes
LOG = 'log.txt'
SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'constant', 'plateau', 'poly', 'wsd', 'rsqrt')  # of timm
LOCK_SECONDS = 20.0  # to wait for a run folder's lock, which the workers of a killed process hold a while longer


def group_parameters(trainable: nn.Module, args: Namespace) -> List[Dict[str, Any]]:
    """Parameter groups in which `args.trunk_lr_scale` scales the rate of all but DEPLA and the classifier.

    Raises:
        ValueError: If `args.layer_decay` is set too.
    """
    if args.layer_decay is not None:
        raise ValueError('--trunk-lr-scale and --layer-decay both scale the rate: give one of them')
    parts = [module.get_classifier() for module in trainable.modules() if hasattr(module, 'get_classifier')]
    parts += [module for module in trainable.modules() if isinstance(module, Depla)]
    new = {id(parameter) for part in parts for parameter in part.parameters()}
    excluded = getattr(trainable, 'no_weight_decay', set)()
    groups = param_groups_weight_decay(trainable, args.weight_decay, no_weight_decay_list=excluded)
    split = []
    for is_new, scale in ((True, {}), (False, dict(lr_scale=args.trunk_lr_scale))):
        for group in groups:
            parameters = [p for p in group['params'] if (id(p) in new) is is_new]
            split += [{**group, 'params': parameters, **scale}] if parameters else []
    return split


def learning_rate(args: Namespace, processes: int) -> float:
    """The learning rate: `args.lr`, or `args.lr_base` scaled to the global batch as in timm's train.py."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * processes * args.grad_accum_steps / args.lr_base_size
    is_adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if is_adaptive else 'linear')
    return args.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)


def create_optimizer(args: Namespace, trainable: nn.Module, num_updates: int) -> Tuple[torch.optim.Optimizer, Any, int]:
    """Optimizer, schedule, and the number of epochs, for `num_updates` updates an epoch.

    Raises:
        ConfigError: If there is no such optimizer or schedule, or it does not take an argument.
    """
    try:
        groups = partial(group_parameters, args=args) if getattr(args, 'trunk_lr_scale', None) is not None else None
        optimizer = create_optimizer_v2(trainable, **optimizer_kwargs(args), **args.opt_kwargs, param_group_fn=groups)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        hint = '' if args.opt.lower() in list_optimizers() else closest(args.opt.lower(), list_optimizers())
        raise ConfigError(f"cannot create optimizer '{args.opt}': {error}{hint}") from error
    if args.sched not in SCHEDULES:
        hint = closest(args.sched, SCHEDULES)
        raise ConfigError(f"no schedule '{args.sched}'{hint}: give one of {', '.join(SCHEDULES)}")
    try:
        scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=num_updates)
    except (ArithmeticError, AssertionError, LookupError, ValueError) as error:
        hint = '; give --no-sched-on-updates' if args.sched == 'plateau' and args.sched_on_updates else ''
        raise ConfigError(f"cannot create schedule '{args.sched}': {error}{hint}") from error
    if args.warmup_epochs > num_epochs:
        message = 'the warm-up of %s epochs is longer than the %d epochs: the learning rate never reaches %.4g'
        _logger.warning(message, args.warmup_epochs, num_epochs, args.lr)
    if args.stop_epoch is not None and not 0 < args.stop_epoch <= num_epochs:
        raise ConfigError(f'--stop-epoch {args.stop_epoch} is not within the {num_epochs} epochs of the schedule')
    return optimizer, scheduler, num_epochs


def check_finite(model: nn.Module) -> None:
    """Refuse a network with weights that are not finite, of which every output would be useless.

    Raises:
        ConfigError: If there is one; names it.
    """
    wrong = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if wrong:
        raise ConfigError(f'the weights to start from are not finite: {", ".join(wrong[:3])}; start from others')


def assemble(
    kind: Type[Run], args: Namespace, world: World, task: nn.Module, model: nn.Module, config: bytes, loaders: Tuple
) -> Run:
    """Build a run: create optimizer, schedule and weight average, and make the task distributed.

    Args:
        kind: The run's class.
        args: Its arguments.
        world: The processes that train together.
        task: timm's training task of the model.
        model: The network, on its device.
        config: Its config.json.
        loaders: The loaders of training and validation.

    Raises:
        ConfigError: If an argument of optimizer or schedule is out of range.
    """
    check_finite(model)
    trainable = unwrap_model(task.get_trainable_module())
    num_updates = math.ceil(len(loaders[0]) / args.grad_accum_steps)
    args = updated(args, lr=learning_rate(args, world.size))
    optimizer, scheduler, num_epochs = create_optimizer(args, trainable, num_updates)
    ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    compile_depla(args, model, *([ema.module] if ema else []))
    scaler = NativeScaler(world.device.type) if args.amp and args.amp_dtype == 'float16' else None
    if world.size > 1:
        device_ids = None if world.device.type == 'cpu' else [world.device]
        task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not args.no_ddp_bb)
    if '..' in Path(args.experiment).parts or Path(args.experiment).is_absolute():
        raise ConfigError(f"--experiment '{args.experiment}' is not in --output '{args.output}': name a folder there")
    name = args.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{safe_model_name(args.model)}'
    folder = world.broadcast(Path(args.output) / name)
    return kind(
        args, world, folder, model, trainable, task, optimizer, scheduler, scaler, ema, config, *loaders,
        num_epochs,
    )  # fmt: skip


def find_resume(args: Namespace, world: World) -> Tuple[Namespace, Optional[Path]]:
    """Return the arguments, with output and experiment of the resumed run, and the checkpoint to resume from, if any.

    Raises:
        ConfigError: If a named checkpoint is missing or damaged, or 'auto' is given without an experiment.
    """
    if not args.resume:
        return args, None
    path = Path(args.resume)
    if args.resume == 'auto':
        if not args.experiment:
            raise ConfigError('--resume auto goes on with a run by name: add --experiment, or give its folder')
        path = Path(args.output) / args.experiment
    elif path.resolve().parent.name == 'checkpoints':
        path = path.resolve()
    is_checkpoint = path.parent.name == 'checkpoints'
    damage = find_damage(path) if is_checkpoint else None
    if damage is not None:
        raise ConfigError(f"'{path}' is no whole checkpoint ({damage}): give the run's folder for its newest one")
    checkpoint = world.broadcast(path if is_checkpoint else newest_checkpoint(path, diverged_epoch(path)))
    if checkpoint is None and args.resume != 'auto':
        instead = "give a run's folder"
        if found := read_timm_run(args.resume):
            instead = f"timm's do not tell where in the data to go on; --initial-checkpoint {found.file} starts from it"
        raise ConfigError(f"'{args.resume}' has no checkpoint to go on from: {instead}")
    run = checkpoint.parent.parent if checkpoint is not None else path
    return updated(args, output=str(run.parent), experiment=run.name), checkpoint


def diverged_epoch(run: Path) -> Optional[int]:
    """The epoch in which the loss was not finite, if the run ended so: weights of that epoch may be useless."""
    file = run / DIVERGED
    try:
        return int(read_mapping(file)['epoch']) if file.exists() else None
    except (KeyError, OverflowError, TypeError, ValueError):
        return None


@contextmanager
def open_folder(run: Run, resumed: bool) -> Iterator[None]:
    """Create and lock the run folder, and write its configuration, args.yaml.

    Raises:
        ConfigError: If it already holds another run, another process locks it, or it cannot be written.
    """
    args, folder = run.args, run.folder
    if not run.world.is_primary:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=resumed or args.resume == 'auto')
        check_own(folder, LINKS)
        (folder / 'checkpoints').mkdir(exist_ok=True)
        open_to_append(folder / '.lock').close()
    except FileExistsError as error:
        raise ConfigError(
            f"run folder '{folder}' exists: go on with it by --resume auto, or choose another --experiment or --output"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write run folder '{folder}': {error}") from error
    lock, holder = FileLock(folder / '.lock'), folder / '.holder'
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        who = holder.read_text() if holder.is_file() else 'another process'
        raise ConfigError(
            f"run folder '{folder}' is in use by {who}: let it end, or name another --experiment"
        ) from error
    with lock:
        write_file(holder, f'process {os.getpid()} on {platform.node()}'.encode())
        write_file(folder / 'args.yaml', yaml.safe_dump(vars(args), sort_keys=False).encode())
        try:
            with log_to(folder / LOG):
                yield
        finally:
            lock.release(force=True)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Add to a file what is logged meanwhile, and the error that ends it.

    Raises:
        ConfigError: If the file cannot be written.
    """
    try:
        handler = logging.StreamHandler(io.TextIOWrapper(open_to_append(path), 'utf-8', 'backslashreplace'))
    except OSError as error:
        raise ConfigError(f"cannot write '{path}': {error}") from error
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
    handler.handleError = lambda record: None  # a full disk is told by what must be written
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            handler.stream.write(f'{type(error).__name__}: {escape(str(error))}\n')
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):
            handler.stream.close()


def rejoin(run: Run, is_changed: bool) -> None:
    """Make the run folder agree with the resumed position; if the training has changed, move later checkpoints away.

    Raises:
        TrainingError: If the folder cannot be written.
    """
    folder = run.folder / 'checkpoints' / checkpoint_name(run.epoch, run.step)
    is_diverged = (run.folder / DIVERGED).is_file()
    if (
        run.world.is_primary
        and (is_changed or is_diverged)
        and (replaced := set_aside(run.folder, run.epoch, run.step))
    ):
        _logger.warning('the checkpoints after %s are in %s now', folder.name, replaced)
    if not run.world.broadcast(folder.is_dir()):  # another batch size has moved the position
        run.save()
    elif run.world.is_primary:
        run.publish(folder.name, run.history)
    if run.world.is_primary:
        with writing(run.folder / DIVERGED):
            (run.folder / DIVERGED).unlink(missing_ok=True)
    if run.world.is_primary and (run.folder / 'best').exists() and (damage := find_damage(run.folder / 'best')):
        _logger.warning('the best checkpoint so far is damaged: %s', damage)
