"""The device: its kernels, precision and compiler."""

import os
from argparse import Namespace
from typing import Any, Dict

import torch
import torch.nn as nn

from timm_depla.errors import ConfigError

from .distributed import World

__all__ = ['autocast', 'check_compile', 'set_up_device']


def set_up_device(args: Namespace, world: World) -> None:
    """Select deterministic or the fastest kernels."""
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if world.device.type == 'cuda':
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.backends.cudnn.benchmark = not args.deterministic
        torch.backends.cuda.matmul.allow_tf32 = True


def autocast(args: Namespace) -> torch.autocast:
    """Autocast context with the precision of the arguments."""
    return torch.autocast(torch.device(args.device).type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def check_compile(args: Namespace) -> Dict[str, Any]:
    """Arguments of `torch.compile`, which torch must know; empty if nothing is compiled."""
    if not getattr(args, 'torchcompile', None):  # detectors are not compiled
        return {}
    kwargs = dict(backend=args.torchcompile, mode=args.torchcompile_mode)
    try:
        torch.compile(nn.Identity(), **kwargs)
    except RuntimeError as error:
        raise ConfigError(f"--torchcompile '{args.torchcompile}': {str(error).splitlines()[0]}") from error
    return kwargs
