"""The device: its kernels, precision and compiler."""

import os
from argparse import Namespace
from typing import Any, Dict

import torch
import torch.nn as nn

from timm_depla.compile import compile_blocks
from timm_depla.errors import ConfigError, as_config_error

from .distributed import World


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


def check_compile(args: Namespace, flag: str = 'torchcompile') -> Dict[str, Any]:
    """Arguments of `torch.compile`, which torch must know, for what the flag compiles; empty if that is nothing."""
    backend = getattr(args, flag, None)
    if not backend:
        return {}
    kwargs = dict(backend=backend, mode=args.torchcompile_mode)
    try:
        torch.compile(nn.Identity(), **kwargs)
    except RuntimeError as error:
        raise ConfigError(f"--{flag.replace('_', '-')} '{backend}': {str(error).splitlines()[0]}") from error
    return kwargs


def compile_depla(args: Namespace, *models: nn.Module) -> None:
    """Compile the blocks with DEPLA if `args.torchcompile_blocks` is set, which only networks with DEPLA take."""
    compiled = check_compile(args, 'torchcompile_blocks')
    if compiled and check_compile(args):
        raise ConfigError('--torchcompile compiles the blocks, too: leave out --torchcompile-blocks')
    with as_config_error('--torchcompile-blocks: '):
        for model in models if compiled else ():
            compile_blocks(model, **compiled)
