"""A training run: what is trained on which data, its state and its folder, and resuming from a checkpoint."""

import json
import logging
import math
import os
from argparse import Namespace
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch.nn as nn
from timm.task import TrainingTask

from timm_depla.errors import ConfigError, DivergedError, as_config_error
from timm_depla.files import read_tensors

from .checkpoint import position, read_state, to_cpu
from .config import FlagParser
from .distributed import Interrupt, World
from .folder import RunFolder, run_path
from .metrics import PLAIN, Metric, choose
from .optimizer import create_state

_logger = logging.getLogger(__name__)

CHANGE_NOTHING = {
    'checkpoint_hist', 'checkpoint_minutes', 'data_dir', 'dataset_download', 'dry_run', 'experiment',
    'initial_checkpoint', 'log_interval', 'log_tensorboard', 'log_wandb', 'no_resume_opt', 'output', 'pin_mem',
    'pretrained', 'pretrained_backbone', 'pretrained_path', 'recipe', 'recovery_interval', 'resume',
    'resume_with_changes', 'save_epochs', 'stop_epoch', 'validation_batch_size', 'wandb_project', 'wandb_resume_id',
    'wandb_tags', 'workers',
}  # fmt: skip
"""Arguments that a resumed run may change without changing the training."""
_OF_DATA = ('classes', 'files', 'num_classes', 'training_images')


class Run:
    """A run of training; classification and detection are subclasses, with what they measure.

    Args:
        args: The arguments; the attribute has the learning rate that the batch gives.
        world: The processes that train together.
        task: timm's training task of the network, on its device.
        config: The config.json that rebuilds the network beside its weights.
        loaders: Of training and validation.
        data: What identifies the data: `classes`, their names in order, and `files`, a digest of the file names.

    Raises:
        ConfigError: If the network has weights that are not finite, or an argument is out of range.
    """

    metrics: Sequence[Metric]  # what validation measures of a network
    train_script: str
    validate_script: str
    create_parser: Callable[[], FlagParser]  # of the first

    def __init__(
        self, args: Namespace, world: World, task: TrainingTask, config: bytes, loaders: Tuple, data: Dict[str, Any]
    ):
        self.world, self.config, self.data = world, config, data
        self.loader, self.val_loader = loaders
        self.args, self.state, self.num_epochs = create_state(args, world, task, len(self.loader))
        plain = [replace(m, name=f'{PLAIN}{m.name}', label=f'{m.label} without average') for m in self.metrics]
        metrics = [*self.metrics, *(plain if args.model_ema else [])]
        self.folder = RunFolder(world.broadcast(run_path(args)), self.args, metrics)

    def evaluate(self, model: nn.Module, interrupt: Interrupt) -> Dict[str, float]:
        """The metrics of a network, equal in all processes. Every process must call this."""
        raise NotImplementedError

    def subject(self) -> Dict[str, str]:
        """Lines on the model and the data for the plan."""
        raise NotImplementedError

    @property
    def model(self) -> nn.Module:
        """The network, with the data configuration of its training in `pretrained_cfg`."""
        return self.state.networks[0]

    @property
    def end(self) -> int:
        """The epoch at which training ends, exclusive."""
        return self.args.stop_epoch or self.num_epochs

    @property
    def updates_per_epoch(self) -> int:
        """Updates of the weights per epoch."""
        return math.ceil(len(self.loader) / self.args.grad_accum_steps)

    @property
    def updates(self) -> int:
        """Updates of the weights so far."""
        return self.state.epoch * self.updates_per_epoch + math.ceil(self.state.step / self.args.grad_accum_steps)

    def validate(self, interrupt: Interrupt) -> Dict[str, float]:
        """The metrics of the network; of averaged weights, and then also of the plain ones."""
        networks, task = self.state.networks, self.state.task
        compiled = getattr(task, 'eval_model_ema' if task.has_ema() else 'eval_model', None)
        metrics = self.evaluate(networks[-1] if compiled is None else compiled, interrupt)
        for network in networks[:-1]:
            plain = self.evaluate(network, interrupt)
            metrics.update({f'{PLAIN}{name}': value for name, value in plain.items() if name != 'count'})
        return metrics

    def arguments(self) -> Dict[str, Any]:
        """The arguments and data that determine this training, and the folder of the data."""
        arguments = {
            **{key: value for key, value in vars(self.args).items() if key not in CHANGE_NOTHING},
            'data_dir': os.path.realpath(self.args.data_dir) if self.args.data_dir else '',
            'device': self.world.device.type,
            'world_size': self.world.size,
            'training_images': self.loader.num_images,
            **self.data,
        }
        return json.loads(json.dumps(arguments))  # tuples are lists, as in a checkpoint

    def save(self) -> None:
        """Write a checkpoint at this position in the background. Every process must call this.

        Its model.safetensors has the average, or the plain weights after an epoch in which they were better. A failure
        to write the previous checkpoint is raised here.
        """
        ranks = self.world.gather(self.state.rank_state_dict())
        if not self.world.is_primary:
            return
        state = {**self.state.state_dict(), 'ranks': ranks, 'arguments': self.arguments()}
        row, metric = (self.state.history or [{}])[-1], self.args.eval_metric
        is_validated = self.state.step == 0 and f'eval_{metric}' in row
        is_plain = is_validated and choose(row, metric)[1].startswith(f'eval_{PLAIN}')
        weights = state.pop('state_dict' if is_plain or not self.args.model_ema else 'state_dict_ema')
        weights = {name: to_cpu(value) for name, value in weights.items()}
        if wrong := [name for name, value in weights.items() if not value.isfinite().all()]:  # by the last update
            raise DivergedError(f'{wrong[0]} is not finite at learning rate {self.state.rate:.3g}: lower --lr')
        self.folder.save(state, weights, self.config)

    def resume(self, checkpoint: Path) -> bool:
        """Resume from an intact checkpoint; returns whether the training differs from the one that wrote it.

        ConfigError if the data differ, or the training does and `--resume-with-changes` is not given.
        """
        options = [{k: v for k, v in group.items() if k != 'params'} for group in self.state.optimizer.param_groups]
        kinds = ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
        with as_config_error(f"cannot resume from '{checkpoint}': ", *kinds):
            state, weights = read_state(checkpoint), read_tensors(checkpoint / 'model.safetensors')
            changes = self._find_changes(checkpoint, state)
            if self.args.no_resume_opt:
                del state['optimizer']
            self.state.load_state_dict({'state_dict': weights, 'state_dict_ema': weights, **state})
            if not changes:
                self.state.load_rank_state_dict(state['ranks'][self.world.rank])
            if (self.state.epoch, self.state.step) != position(checkpoint):
                raise ValueError('its state is of another position')
            sum((value for row in self.state.history for value in row.values()), 0.0)  # each must be a number
        if changes:
            _logger.warning('resuming with changes: %s', '; '.join(changes))
            for group, option in zip(self.state.optimizer.param_groups, options, strict=False):
                group.update(option)
            self._adapt(state['arguments'])
        _logger.info('resuming from %s: epoch %d, step %d', checkpoint, self.state.epoch, self.state.step)
        return bool(changes)

    def _find_changes(self, checkpoint: Path, state: Dict[str, Any]) -> List[str]:
        """How the training differs from a checkpoint's; refuses what may not differ."""
        changes = describe_changes(state['arguments'], self.arguments())
        is_moved = changes.pop('data_dir', None)  # which may be
        if 'classes' in changes or ('files' in changes and is_moved):
            differing = '; '.join(changes[key] for key in _OF_DATA if key in changes)
            raise ConfigError(
                f"'{checkpoint}' belongs to a training on other data: {differing}. Give its data, or start a "
                f'training from its weights: --initial-checkpoint {checkpoint / "model.safetensors"}'
            )
        if self.args.no_resume_opt:
            changes['optimizer'] = 'without the state of the optimizer'
        if changes and not self.args.resume_with_changes:
            raise ConfigError(
                f"'{checkpoint}' belongs to a training with other arguments: {'; '.join(changes.values())}. Give the "
                'old ones, or resume with the new ones by --resume-with-changes'
            )
        return list(changes.values())

    def _adapt(self, old: Dict[str, Any]) -> None:
        """Move position and schedule to the same number of seen images under the new arguments."""
        state, batch = self.state, self.args.batch_size * self.world.size
        state.step = state.step * old['batch_size'] * old['world_size'] // batch
        state.step -= state.step % self.args.grad_accum_steps
        state.scheduler.step(state.epoch)
        state.scheduler.step_update(self.updates)


def describe_changes(old: Dict[str, Any], new: Dict[str, Any]) -> Dict[str, str]:
    """What differs between two runs' `arguments`, in words."""
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changes = {key: f'{key.replace("_", " ")} {old.get(key)!r} -> {new.get(key)!r}' for key in changed}
    if 'files' in changes:
        changes['files'] = 'the names of the training images, or their order'
    if 'classes' in changes:
        pairs = [f'{a!r} -> {b!r}' for a, b in zip_longest(old['classes'], new['classes']) if a != b]
        changes['classes'] = f'classes {", ".join(pairs[:3])}{", ..." if len(pairs) > 3 else ""}'
    return changes
