"""What a training starts with: its optimizer and schedule."""

import math
from argparse import Namespace
from functools import partial
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_depla.layers import Depla

from .errors import ConfigError
from .world import World

__all__ = ['create_optimizer', 'group_parameters']


def group_parameters(trainable: nn.Module, args: Namespace) -> List[Dict[str, Any]]:
    """Parameter groups with the rate of the trunk, all but DEPLA and the classifier, scaled by `args.trunk_lr_scale`.

    Raises:
        ValueError: If the rates differ by layer already.
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


def create_optimizer(
    args: Namespace, trainable: nn.Module, world: World, num_updates: int
) -> Tuple[torch.optim.Optimizer, Any, int]:
    """Optimizer, schedule, and the number of epochs, for `num_updates` updates an epoch; sets `args.lr`.

    Raises:
        ConfigError: If there is no such optimizer or schedule, or it does not take an argument.
    """
    if args.lr is None:
        ratio = args.batch_size * world.size * args.grad_accum_steps / args.lr_base_size
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
        args.lr = args.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)
    try:
        groups = partial(group_parameters, args=args) if getattr(args, 'trunk_lr_scale', None) is not None else None
        optimizer = create_optimizer_v2(trainable, **optimizer_kwargs(args), **args.opt_kwargs, param_group_fn=groups)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot create optimizer '{args.opt}': {error}") from error
    try:
        scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=num_updates)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"cannot create schedule '{args.sched}': {error}") from error
    if scheduler is None:
        raise ConfigError(f"cannot create schedule '{args.sched}': use one of timm's, such as cosine or constant")
    if args.stop_epoch is not None and not 0 < args.stop_epoch <= num_epochs:
        raise ConfigError(f'--stop-epoch {args.stop_epoch} is not within the {num_epochs} epochs of the schedule')
    return optimizer, scheduler, num_epochs
