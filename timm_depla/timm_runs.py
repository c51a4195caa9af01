"""Runs of timm's train.py: their checkpoints, and the arguments that its args.yaml and ours share."""

import argparse
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config

from timm_depla.errors import ConfigError, as_config_error
from timm_depla.files import read_mapping
from timm_depla.schema import RUN, check, check_arguments

_CHECKPOINTS = ('model_best.pth.tar', 'last.pth.tar')
_DEFAULTS = {
    'kd_loss_type': 'kl',
    'kd_token_distill_type': 'soft',
    'naflex_loss_scale': 'linear',
    'naflex_max_seq_len': 576,
    'naflex_train_seq_lens': [128, 256, 576, 784, 1024],
    'train_size_random_mix': 0.1,
    'train_size_schedule': 'constant',
    'train_size_schedule_spread': 0.65,
    'variable_batch_loss_scale': 'none',
    'worker_seeding': 'all',
}
"""Defaults of timm's flags that are left out here, where they are not empty, false or 0."""


class TimmRun(NamedTuple):
    """A checkpoint of timm's train.py.

    Attributes:
        file: The checkpoint.
        name: Its model.
        args: The arguments of its training; empty where neither it nor an args.yaml beside it has them.
        epochs: Epochs of its training so far.
    """

    file: Path
    name: str
    args: Dict[str, Any]
    epochs: int

    @property
    def model_args(self) -> Dict[str, Any]:
        """Arguments that rebuild the model; ConfigError if they would load weights from elsewhere."""
        kwargs = dict(self.args.get('model_kwargs') or {})
        with as_config_error():
            check_arguments(kwargs, f"'{self.file}', model_kwargs")
        size = self.args.get('input_size') or [None]
        kwargs.update(num_classes=self.args.get('num_classes'), in_chans=self.args.get('in_chans') or size[0])
        kwargs.update(global_pool=self.args.get('gp'))
        return {key: value for key, value in kwargs.items() if value is not None}

    def configure(self, model: nn.Module) -> None:
        """Put the data configuration of the training into the model's `pretrained_cfg`."""
        model.pretrained_cfg = {**model.pretrained_cfg, **resolve_data_config(self.args, model=model)}


def with_data_dir(args: Dict[str, Any], file: Optional[Path] = None) -> Dict[str, Any]:
    """timm's arguments with its positional data folder as `data_dir`; ValueError if those of a run's file are wrong."""
    rest = {key: value for key, value in args.items() if key != 'data'}
    if data := args.get('data'):
        rest['data_dir'] = rest.get('data_dir') or data
    if file is not None:
        check(rest, RUN, f"'{file}'")
    return rest


def read_timm_run(target: str) -> Optional[TimmRun]:
    """The best checkpoint in a run folder of timm, or a checkpoint file of it; None for anything else.

    The file is read without running code of it: it holds tensors, numbers, strings and an `argparse.Namespace`.
    ConfigError if its args.yaml cannot be read.
    """
    path = Path(target)
    files = [path / name for name in _CHECKPOINTS] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file() and file.suffix in ('.tar', '.pth')), None)
    if file is None:
        return None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(file, map_location='cpu', weights_only=True)
        name, args = found['arch'], found.get('args')
    except Exception:  # a file that is no checkpoint can make the unpickler raise anything
        return None
    if not isinstance(name, str) or not timm.is_model(name) or 'state_dict' not in found:
        return None
    beside = file.parent / 'args.yaml'
    with as_config_error():
        args = vars(args) if isinstance(args, argparse.Namespace) else read_mapping(beside) if beside.is_file() else {}
        args = with_data_dir(args, file)
    epoch = found.get('epoch')
    return TimmRun(file, name, args, epoch + 1 if isinstance(epoch, int) else 0)


def translate(recipe: Dict[str, Any], left_out: Dict[str, str], name: str) -> Dict[str, Any]:
    """A recipe, which may be timm's args.yaml, without the flags of timm that are left out here at their defaults.

    ConfigError if such a flag has another value; it says why there is none.
    """
    recipe = with_data_dir(recipe)
    for key, value in list(recipe.items()):
        if reason := left_out.get(f'--{key}', left_out.get(f'--{key.replace("_", "-")}')):
            if value and value != _DEFAULTS.get(key):
                raise ConfigError(f"recipe '{name}': '{key}: {value}' of timm is not here: {reason}")
            del recipe[key]
    if recipe.get('output') == '':  # timm's default
        del recipe['output']
    return recipe
