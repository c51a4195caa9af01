"""The device: its kernels, precision and compiler."""

import os
from argparse import Namespace
from typing import Any, Dict

import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm

from timm_depla.compile import compile_blocks
from timm_depla.errors import ConfigError

from .distributed import World, keep_memory

__all__ = ['autocast', 'check_compile', 'compile_depla', 'set_up_device', 'share_batch_norm']


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


def check_compile(args: Namespace, flag: str = 'torchcompile') -> Dict[str, Any]:
    """Arguments of `torch.compile` for what the flag compiles; empty if that is nothing.

    Raises:
        ConfigError: If torch has no such backend or mode.
    """
    backend = getattr(args, flag, None)
    if not backend:
        return {}
    kwargs = dict(backend=backend, mode=args.torchcompile_mode)
    try:
        torch.compile(nn.Identity(), **kwargs)
    except RuntimeError as error:
        name = flag.replace('_', '-')
        raise ConfigError(f"--{name} '{backend}': {str(error).splitlines()[0]}") from error
    return kwargs


def compile_depla(args: Namespace, *models: nn.Module) -> None:
    """Compile the blocks with DEPLA if `args.torchcompile_blocks` is set.

    Raises:
        ConfigError: If torch has no such backend or mode, there is no such block, or all is compiled anyway.
    """
    compiled = check_compile(args, 'torchcompile_blocks')
    if compiled and check_compile(args):
        raise ConfigError('--torchcompile compiles the blocks, too: leave out --torchcompile-blocks')
    try:
        for model in models if compiled else ():
            compile_blocks(model, **compiled)
    except ValueError as error:
        raise ConfigError(f'--torchcompile-blocks: {error}') from error


def share_batch_norm(args: Namespace, model: nn.Module, world: World) -> nn.Module:
    """Convert the model's BatchNorms to SyncBatchNorm if `args.sync_bn` is set.

    Raises:
        ConfigError: If several processes train on CPUs.
    """
    if not args.sync_bn or world.size == 1:
        return model
    if world.device.type == 'cpu':
        raise ConfigError('--sync-bn works on GPUs only: give --no-sync-bn')
    return convert_sync_batchnorm(model)
