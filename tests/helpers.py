"""Helpers of tests: create a network, train and validate in this process, run a command in another."""

import csv
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_depla.engine.classification import validate as validation
from timm_depla.engine.classification.flags import create_train_parser, create_validate_parser
from timm_depla.engine.classification.train import train
from timm_depla.engine.config import parse_args

ROOT = Path(__file__).parent.parent
SMALL = ('--recipe', 'digits', '--img-size', 32, '--workers', 0, '--device', 'cpu')  # the digits, of 32 pixels
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2)


def create(name, **kwargs):
    """A network with the same weights every time, in evaluation mode."""
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


@contextmanager
def gpu_autocast(dtype):
    """A GPU's autocast on tensors without data, which need no GPU; `torch.autocast` would refuse."""
    with FakeTensorMode():
        torch.set_autocast_enabled('cuda', True)
        torch.set_autocast_dtype('cuda', dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled('cuda', False)
            torch.set_autocast_dtype('cuda', torch.float16)  # PyTorch's default


def step(network, *inputs, scale=1):
    """The output of a training step, the gradients of inputs and parameters, and the buffers after it."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = network.train()(*inputs)
    network.zero_grad()
    ((out if out.dtype == torch.float64 else out.float()).sin().mean() * scale).backward()
    return [out.detach(), *(x.grad for x in [*inputs, *network.parameters()]), *network.buffers()]


def change_arguments(run, **values):
    """Change the args.yaml of a run; returns its path."""
    path = run / 'args.yaml'
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))
    return path


def write_recipe(path, model_kwargs, **values):
    """The recipe of the scenes with a smaller detector and other values, as a file."""
    recipe = yaml.safe_load((ROOT / 'timm_depla' / 'recipes' / 'detection' / 'scenes.yaml').read_text())
    recipe['model_kwargs'].update(out_channels=16, box_score_thresh=0.0, **model_kwargs)
    path.write_text(yaml.safe_dump({**recipe, 'workers': 0, **values}))
    return path


def summary(run):
    """The rows of a run's summary.csv, one for each epoch."""
    return list(csv.DictReader((run / 'summary.csv').open()))


def flip_bit(file):
    """Damage a file in a bit near its end."""
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def equal(a, b):
    """Whether two lists of batches, each of images and targets, are the same."""
    return len(a) == len(b) and all(torch.equal(s[i], t[i]) for s, t in zip(a, b, strict=True) for i in (0, 1))


def fit(*argv):
    """Do what `train.py` does; returns the exit code."""
    return train(parse_args(create_train_parser(), [str(a) for a in argv]))


def validate(*argv):
    """Do what `validate.py` does; returns its rows."""
    return validation.validate(parse_args(create_validate_parser(), [str(a) for a in ['--workers', 0, *argv]]))


def run(*argv, fails=False, **environment):
    """Run `python *argv` in the project's folder, as a user does; returns what came of it."""
    command, options = [sys.executable, *map(str, argv)], dict(cwd=ROOT, env={**os.environ, **environment})
    result = subprocess.run(command, **options, capture_output=True, text=True, timeout=300)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result
