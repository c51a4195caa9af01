"""A training run: its parts, its state in a checkpoint, and resuming from one."""

import csv
import io
import json
import logging
import math
import os
from argparse import Namespace
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Callable, ClassVar, Dict, List, Optional, Sequence

import safetensors.torch
import torch
import torch.nn as nn
from timm.utils import ModelEmaV3, NativeScaler

from timm_depla.errors import ConfigError, DivergedError
from timm_depla.files import read_tensors

from .checkpoint import (
    TIMES,
    BackgroundWriter,
    checkpoint_name,
    link,
    pack_state,
    prune,
    read_state,
    write_checkpoint,
    write_file,
)
from .config import FlagParser
from .curves import draw_curves
from .distributed import Interrupt, World
from .metrics import PLAIN, Metric, choose

__all__ = ['CHANGE_NOTHING', 'Losses', 'Run']

_logger = logging.getLogger(__name__)

CHANGE_NOTHING = {
    'checkpoint_hist', 'checkpoint_minutes', 'data_dir', 'dataset_download', 'dry_run', 'experiment',
    'initial_checkpoint', 'log_interval', 'log_tensorboard', 'log_wandb', 'no_resume_opt', 'output', 'pin_mem',
    'pretrained', 'pretrained_backbone', 'pretrained_path', 'recipe', 'recovery_interval', 'resume',
    'resume_with_changes', 'save_epochs', 'stop_epoch', 'validation_batch_size', 'wandb_project', 'wandb_resume_id',
    'wandb_tags', 'workers',
}  # fmt: skip
"""Arguments that a resumed run may change without changing the training."""


@dataclass
class Losses:
    """The mean loss of an epoch in this process, read one step late so that the device does not wait.

    Raises:
        DivergedError: From `add` and `flush`, if a loss is not finite.
    """

    total: float = 0.0
    count: int = 0
    _pending: Any = None

    def add(self, loss: torch.Tensor, count: int, where: Any) -> None:
        """Store a step's loss, and read the previous one.

        Args:
            loss: The mean over the step's images, a scalar.
            count: The number of images.
            where: Called for a description of the step if the loss is not finite.
        """
        self.flush()
        self._pending = (loss.detach(), count, where)

    def flush(self) -> None:
        """Read the loss that is still pending."""
        if self._pending is None:
            return
        loss, count, where = self._pending
        self._pending = None
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(f'the loss is {value} {where()}')
        self.total += value * count
        self.count += count

    @property
    def mean(self) -> float:
        """The mean so far; not a number before one is read."""
        return self.total / self.count if self.count else math.nan


@dataclass
class Run:
    """A run between two steps; classification and detection are subclasses.

    Attributes:
        metrics: What validation measures of a network.
        train_script, validate_script: The commands.
        create_parser: The parser of the first.
        model: The unwrapped network, with the data configuration of its training in `pretrained_cfg`.
        trainable: What the optimizer trains: the model, or with feature distillation a module around it.
        task: timm's training task, with the modules that it calls: distributed, compiled.
        config: The config.json that rebuilds the model beside its weights.
        loader: The training batches, on the device, from any step of any epoch on.
        val_loader: The validation batches.
        num_epochs: Epochs of the schedule.
        epoch, step: The position: the next step to take. If `step` is the number of steps, validation is next.
        rate: The learning rate of the last step.
        seconds: That the epoch has taken in training so far.
        history: A row of summary.csv for each epoch.
        data: What identifies the data: `classes`, their names in order, and `files`, a digest of the file names.
        eval_model: What validation calls: `evaluated`, or its compiled form.
    """

    metrics: ClassVar[Sequence[Metric]]
    train_script: ClassVar[str]
    validate_script: ClassVar[str]
    create_parser: ClassVar[Callable[[], FlagParser]]

    args: Namespace
    world: World
    folder: Path
    model: nn.Module
    trainable: nn.Module
    task: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Optional[NativeScaler]
    ema: Optional[ModelEmaV3]
    config: bytes
    loader: Any
    val_loader: Any
    num_epochs: int
    epoch: int = 0
    step: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    losses: Losses = field(default_factory=Losses)
    history: List[Dict[str, Any]] = field(default_factory=list)
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)
    data: Dict[str, Any] = field(default_factory=dict)
    eval_model: Any = None

    def __post_init__(self) -> None:
        self.eval_model = self.evaluated

    def evaluate(self, model: nn.Module, interrupt: Interrupt) -> Dict[str, float]:
        """The metrics of a network, equal in all processes. Every process must call this."""
        raise NotImplementedError

    def validate(self, interrupt: Interrupt) -> Dict[str, float]:
        """The metrics of `eval_model`; where that is an average of the weights, also those of the plain weights."""
        metrics = self.evaluate(self.eval_model, interrupt)
        if self.ema is not None:
            plain = self.evaluate(self.model, interrupt)
            metrics.update({f'{PLAIN}{name}': value for name, value in plain.items() if name != 'count'})
        return metrics

    @property
    def all_metrics(self) -> Sequence[Metric]:
        """`metrics`, and with an average those of the plain weights."""
        plain = [replace(m, name=f'{PLAIN}{m.name}', label=f'{m.label} without average') for m in self.metrics]
        return [*self.metrics, *(plain if self.ema is not None else [])]

    def subject(self) -> Dict[str, str]:
        """Lines on the model and the data for the plan."""
        raise NotImplementedError

    @property
    def end(self) -> int:
        """The epoch at which training ends, exclusive."""
        return self.args.stop_epoch or self.num_epochs

    @property
    def updates_per_epoch(self) -> int:
        """Updates of the weights per epoch."""
        return math.ceil(len(self.loader) / self.args.grad_accum_steps)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and saved: the weight average if there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def updates(self) -> int:
        """Updates of the weights so far."""
        return self.epoch * self.updates_per_epoch + self.step // self.args.grad_accum_steps

    def ranked(self, history: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """The validated epochs' rows, best first."""
        rows = (row for row in history if f'eval_{self.args.eval_metric}' in row)
        return sorted(rows, key=lambda row: choose(row, self.args.eval_metric)[0])

    @property
    def kept(self) -> nn.Module:
        """The network that a checkpoint keeps: the average, or the plain weights after an epoch in which they won."""
        row = self.history[-1] if self.history else {}
        is_validated = self.step == 0 and f'eval_{self.args.eval_metric}' in row
        if is_validated and choose(row, self.args.eval_metric)[1].startswith(f'eval_{PLAIN}'):
            return self.model
        return self.evaluated

    def arguments(self) -> Dict[str, Any]:
        """The arguments and data that determine this training."""
        kept = {key: value for key, value in vars(self.args).items() if key not in CHANGE_NOTHING}
        return {
            **kept,
            'device': self.world.device.type,
            'world_size': self.world.size,
            'training_images': self.loader.num_images,
            **self.data,
        }

    def _rank_state(self) -> Dict[str, Any]:
        """What differs between processes: the running loss, and batch statistics."""
        self.losses.flush()
        state: Dict[str, Any] = {'loss': (self.losses.total, self.losses.count)}
        if self.world.size > 1:
            modules = [self.model] if self.ema is None else [self.model, self.ema.module]
            state['buffers'] = [{name: b.cpu() for name, b in module.named_buffers()} for module in modules]
        return state

    def save(self) -> None:
        """Write a checkpoint at this position in the background. Every process must call this.

        Raises:
            TrainingError: If the loss is not finite, or the previous checkpoint could not be written.
        """
        ranks = self.world.gather(self._rank_state())
        if not self.world.is_primary:
            return
        state = {
            'position': (self.epoch, self.step),
            'rate': self.rate,
            'seconds': self.seconds,
            'arguments': self.arguments(),
            'data_dir': self._data_dir(),
            'history': [dict(row) for row in self.history],
            'ranks': ranks,
            'optimizer': _copy(self.optimizer.state_dict()),
            'scheduler': scheduler_state(self.scheduler),
            'scaler': self.scaler.state_dict() if self.scaler is not None else None,
        }
        if self.trainable is not self.kept:
            state['trainable'] = _copy(self.trainable.state_dict())
        if self.evaluated is not self.kept:
            state['average'] = _copy(self.evaluated.state_dict())
        weights = _copy(self.kept.state_dict(), torch.contiguous_format)  # safetensors has no channels last
        if wrong := [name for name, value in weights.items() if not value.isfinite().all()]:  # by the last update
            raise DivergedError(f'{wrong[0]} is not finite at learning rate {self.rate:.3g}: lower --lr')
        self.writer.submit(self._write, checkpoint_name(self.epoch, self.step), state, weights)

    def _write(self, name: str, state: Dict[str, Any], weights: Dict[str, torch.Tensor]) -> None:
        history = state['history']
        record = {**(history[-1] if history else {}), **dict(zip(('epoch', 'step'), state['position'], strict=True))}
        files = {
            'model.safetensors': safetensors.torch.save(weights, metadata={'format': 'pt'}),
            'config.json': self.config,
            'record.json': (json.dumps(record, indent=2) + '\n').encode(),
            **pack_state(state),
        }
        write_checkpoint(self.folder / 'checkpoints' / name, files)
        self.publish(name, history)

    def publish(self, name: str, history: List[Dict[str, Any]]) -> None:
        """Update summary, curves and links to the newest checkpoint, and remove checkpoints no longer needed."""
        folder = self.folder / 'checkpoints'
        text = io.StringIO()
        columns = ['epoch', 'train_loss', *(metric.column for metric in self.all_metrics), 'lr', *TIMES]
        writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows(history)
        write_file(self.folder / 'summary.csv', text.getvalue().encode())
        curves = draw_curves(history, self.all_metrics)
        if curves:
            write_file(self.folder / 'curves.png', curves)
        link(self.folder / 'last', folder / name)
        ranked = [checkpoint_name(row['epoch'] + 1, 0) for row in self.ranked(history)]
        if ranked and (folder / ranked[0]).is_dir():
            link(self.folder / 'best', folder / ranked[0])
        kept = ranked[: max(self.args.checkpoint_hist, 1)]
        prune(self.folder, [*kept, *(checkpoint_name(epoch, 0) for epoch in self.args.save_epochs)])

    def load(self, checkpoint: Path) -> bool:
        """Resume from an intact checkpoint; returns whether the training differs from the one that wrote it.

        Raises:
            ConfigError: If the training differs and `--resume-with-changes` is not given.
        """
        try:
            state = read_state(checkpoint)
        except ValueError as error:
            raise ConfigError(f"cannot go on from '{checkpoint}': {error}") from error
        changes = self._changes(state['arguments'])
        if self.args.no_resume_opt:
            changes.append('without the state of the optimizer')
        if not self._is_same_data(state):
            changes = [change for change in changes if change.startswith(_DATA)] or changes
            raise ConfigError(
                f"'{checkpoint}' belongs to a training on other data: {'; '.join(changes)}. Give its data, or start a "
                f'training from its weights: --initial-checkpoint {checkpoint / "model.safetensors"}'
            )
        if changes and not self.args.resume_with_changes:
            raise ConfigError(
                f"'{checkpoint}' belongs to a training with other arguments: {'; '.join(changes)}. Give the old "
                'ones, or go on with the new ones by --resume-with-changes'
            )
        try:
            weights = read_tensors(checkpoint / 'model.safetensors')
            self.evaluated.load_state_dict(state.get('average', weights))
            if self.trainable is not self.evaluated:
                self.trainable.load_state_dict(state.get('trainable', weights))
            if not self.args.no_resume_opt:
                options = [{k: v for k, v in group.items() if k != 'params'} for group in self.optimizer.param_groups]
                self.optimizer.load_state_dict(state['optimizer'])
                for group, option in zip(self.optimizer.param_groups, options if changes else [], strict=False):
                    group.update(option)
                if self.scaler is not None and state['scaler']:
                    self.scaler.load_state_dict(state['scaler'])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ConfigError(f"cannot go on from '{checkpoint}': {error}") from error
        load_scheduler_state(self.scheduler, state['scheduler'])
        self.epoch, self.step = state['position']
        self.rate, self.seconds = state.get('rate', 0.0), state.get('seconds', 0.0)
        self.history = state['history']
        if changes:
            _logger.warning('going on with changes: %s', '; '.join(changes))
            self._adapt(state['arguments'])
        else:
            self._load_rank_state(state['ranks'][self.world.rank])
        return bool(changes)

    def _is_same_data(self, state: Dict[str, Any]) -> bool:
        """Whether a state is of the same classes, and of the same images or at least the same folder."""
        old, new = state['arguments'], self.arguments()
        if old.get('classes') != new.get('classes'):
            return False
        return old.get('files') == new.get('files') or state.get('data_dir') == self._data_dir()

    def _data_dir(self) -> str:
        return os.path.realpath(self.args.data_dir) if self.args.data_dir else ''

    def _load_rank_state(self, state: Dict[str, Any]) -> None:
        self.losses = Losses(*state['loss'])
        modules = [self.model] if self.ema is None else [self.model, self.ema.module]
        for module, buffers in zip(modules, state.get('buffers', []), strict=False):
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])

    def _changes(self, old: Dict[str, Any]) -> List[str]:
        new = self.arguments()
        differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return [_describe_change(key, old.get(key), new.get(key)) for key in differing]

    def _adapt(self, old: Dict[str, Any]) -> None:
        """Move position and schedule to the same number of seen images under the new arguments."""
        new = self.arguments()
        self.step = self.step * old['batch_size'] * old['world_size'] // (new['batch_size'] * new['world_size'])
        self.step -= self.step % self.args.grad_accum_steps
        self.scheduler.step(self.epoch)
        self.scheduler.step_update(self.updates)


_DATA = ('classes ', 'the names of the training images', 'training images', 'num classes')  # changes of the data


def _describe_change(key: str, old: Any, new: Any) -> str:
    if key == 'files':
        return 'the names of the training images, or their order'
    if key == 'classes':
        pairs = [pair for pair in zip_longest(old or [], new or []) if pair[0] != pair[1]]
        return f'classes {", ".join(f"{a!r} -> {b!r}" for a, b in pairs[:3])}{", ..." if len(pairs) > 3 else ""}'
    return f'{key.replace("_", " ")} {old!r} -> {new!r}'


def _copy(value: Any, memory_format: torch.memory_format = torch.preserve_format) -> Any:
    """Copy a state to the CPU, so that training cannot change it."""
    if isinstance(value, torch.Tensor):
        copy = value.detach().to('cpu', copy=True, memory_format=memory_format)
        return copy.contiguous() if memory_format == torch.contiguous_format else copy
    if isinstance(value, dict):
        return {key: _copy(item, memory_format) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item, memory_format) for item in value)
    return value


def scheduler_state(scheduler: Any) -> Dict[str, Any]:
    """State of the plateau schedule; timm's other schedules depend on the position alone."""
    if not hasattr(scheduler, 'lr_scheduler'):
        return {}
    plain = (bool, float, int, list, str, type(None))
    state = {k: v for k, v in scheduler.lr_scheduler.state_dict().items() if isinstance(v, plain)}
    return {'plateau': state, 'restore_lr': scheduler.restore_lr}


def load_scheduler_state(scheduler: Any, state: Dict[str, Any]) -> None:
    """Restore a schedule from its `scheduler_state`."""
    if state:
        scheduler.lr_scheduler.load_state_dict(state['plateau'])
        scheduler.restore_lr = state['restore_lr']
