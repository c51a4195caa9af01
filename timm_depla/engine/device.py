"""The device: its kernels, memory, precision and compiler."""

import ctypes
import os
from argparse import Namespace
from typing import Any, Dict

import torch
import torch.nn as nn

from timm_depla.errors import ConfigError

from .distributed import World

__all__ = ['autocast', 'check_compile', 'keep_memory', 'set_up_device']

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def set_up_device(args: Namespace, world: World) -> None:
    """Select deterministic or the fastest kernels; on a CPU, keep freed memory, which is faster."""
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if world.device.type == 'cpu':
        keep_memory()
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


def keep_memory() -> None:
    """Make glibc keep freed memory, which makes training on a CPU faster; other C libraries are left alone.

    Otherwise glibc requests large blocks from the system at every step, and the system has to clear their pages.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
