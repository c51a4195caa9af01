"""Optimizer, schedule and weight average of a run."""

import logging
import math
from argparse import Namespace
from functools import partial
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import unwrap_model

from timm_depla.errors import ConfigError, closest
from timm_depla.layers import Depla

from .config import updated
from .device import check_compile, compile_depla
from .distributed import World
from .state import TrainState

_logger = logging.getLogger(__name__)

SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'constant', 'plateau', 'poly', 'wsd', 'rsqrt')  # of timm


def group_parameters(trainable: nn.Module, args: Namespace) -> List[Dict[str, Any]]:
    """Parameter groups in which `args.backbone_lr_scale` scales the rate of all but the classifier and what is new.

    New are DEPLA and modules with an attribute `is_new`.
    """
    if args.layer_decay is not None:
        raise ValueError('--backbone-lr-scale and --layer-decay both scale the rate: give one of them')
    parts = [module.get_classifier() for module in trainable.modules() if hasattr(module, 'get_classifier')]
    parts += [module for module in trainable.modules() if isinstance(module, Depla) or hasattr(module, 'is_new')]
    new = {id(parameter) for part in parts for parameter in part.parameters()}
    excluded = getattr(trainable, 'no_weight_decay', set)()
    groups = param_groups_weight_decay(trainable, args.weight_decay, no_weight_decay_list=excluded)
    return [
        {**group, 'params': parameters, **scale}
        for is_new, scale in ((True, {}), (False, dict(lr_scale=args.backbone_lr_scale)))
        for group in groups
        if (parameters := [p for p in group['params'] if (id(p) in new) is is_new])
    ]


def learning_rate(args: Namespace, processes: int) -> float:
    """The learning rate: `args.lr`, or `args.lr_base` scaled to the global batch as in timm's train.py."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * processes * args.grad_accum_steps / args.lr_base_size
    is_adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if is_adaptive else 'linear')
    return args.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)


def create_optimizer(args: Namespace, trainable: nn.Module, num_updates: int) -> Tuple[torch.optim.Optimizer, Any, int]:
    """Optimizer, schedule, and the number of epochs, for `num_updates` updates an epoch."""
    try:
        groups = partial(group_parameters, args=args) if getattr(args, 'backbone_lr_scale', None) is not None else None
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


def create_state(args: Namespace, world: World, task: TrainingTask, steps: int) -> Tuple[Namespace, TrainState, int]:
    """Create optimizer, schedule and weight average of a task, compile it and make it distributed.

    Returns the arguments with the learning rate, the state, and the number of epochs, for `steps` steps an epoch.
    ConfigError if the weights to start from are not finite, or an argument is out of range.
    """
    trainable = unwrap_model(task.get_trainable_module())
    if wrong := [name for name, value in trainable.state_dict().items() if not value.isfinite().all()]:
        raise ConfigError(f'the weights to start from are not finite: {", ".join(wrong[:3])}; start from others')
    if args.sync_bn and world.size > 1:
        if world.device.type == 'cpu':
            raise ConfigError('--sync-bn works on GPUs only: give --no-sync-bn')
        convert_sync_batchnorm(trainable)
    args = updated(args, lr=learning_rate(args, world.size))
    optimizer, scheduler, num_epochs = create_optimizer(args, trainable, math.ceil(steps / args.grad_accum_steps))
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    compile_depla(args, trainable, *([task.get_trainable_module(ema=True)] if args.model_ema else []))
    if compiled := check_compile(args):
        task.compile(**compiled)
        task.compile_ema(**compiled)
    if world.size > 1:
        device_ids = None if world.device.type == 'cpu' else [world.device]
        task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not args.no_ddp_bb)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp and args.amp_dtype == 'float16')
    return args, TrainState(task, optimizer, scheduler, scaler), num_epochs
