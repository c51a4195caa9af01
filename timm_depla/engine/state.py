"""The state of training: what steps and epochs change, and a checkpoint restores."""

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model

from timm_depla.errors import DivergedError


@dataclass
class Losses:
    """The losses of an epoch in this process, read one step late so that the device does not wait."""

    total: float = 0.0
    count: int = 0
    _pending: Optional[Tuple[torch.Tensor, int, Callable[[], str]]] = None

    def add(self, loss: torch.Tensor, count: int, where: Callable[[], str]) -> None:
        """Store a step's mean loss over `count` images, and read the previous one; `where` describes it in an error."""
        self.flush()
        self._pending = (loss.detach(), count, where)

    def flush(self) -> None:
        """Read the loss that is still pending; one that is not finite is a DivergedError."""
        if self._pending is None:
            return
        (loss, count, where), self._pending = self._pending, None
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(f'the loss is {value} {where()}')
        self.total += value * count
        self.count += count


@dataclass
class TrainState:
    """What steps and epochs change, with the methods of PyTorch's Stateful protocol.

    Attributes:
        task: timm's training task: the network and its average, distributed and compiled.
        epoch, step: The position: the next step to take. If `step` is the number of steps, validation is next.
        rate: The learning rate of the last step.
        seconds: That the epoch has taken in training so far.
        losses: Of the epoch, in this process.
        history: A row of summary.csv for each epoch.
    """

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    losses: Losses = field(default_factory=Losses)
    history: List[Dict[str, Any]] = field(default_factory=list)

    @property
    def networks(self) -> List[nn.Module]:
        """The network, and its average if there is one."""
        return [unwrap_model(self.task.get_eval_model(ema=ema)) for ema in range(1 + self.task.has_ema())]

    def state_dict(self) -> Dict[str, Any]:
        """The state that all processes have alike; timm's names for the weights, `state_dict` and `state_dict_ema`."""
        schedule = getattr(self.scheduler, 'lr_scheduler', None)  # timm's other schedules depend on the position alone
        items = schedule.state_dict().items() if schedule is not None else ()
        plateau = {key: value for key, value in items if isinstance(value, (bool, float, int, list, str, type(None)))}
        return {
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
            'optimizer': self.optimizer.state_dict(),
            'plateau': plateau,
            'restore_lr': getattr(self.scheduler, 'restore_lr', None),
            'scaler': self.scaler.state_dict(),
            'position': (self.epoch, self.step),
            'rate': self.rate,
            'seconds': self.seconds,
            'history': self.history,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore a state; one without `optimizer` leaves optimizer and scaler as they are."""
        for end in ['', '_ema'][: len(self.networks)]:
            weights, rest = state_dict[f'state_dict{end}'], state_dict.get(f'task_state{end}')
            self.task.load_checkpoint_state(weights, rest, ema=bool(end))
        if 'optimizer' in state_dict:
            tuples = [[k for k, v in group.items() if isinstance(v, tuple)] for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state_dict['optimizer'])
            for group, keys in zip(self.optimizer.param_groups, tuples, strict=True):
                group.update({key: tuple(group[key]) for key in keys})  # they are lists in a checkpoint
            if state_dict['scaler']:
                self.scaler.load_state_dict(state_dict['scaler'])
        if state_dict['plateau'] and hasattr(self.scheduler, 'lr_scheduler'):
            self.scheduler.lr_scheduler.load_state_dict(state_dict['plateau'])
            self.scheduler.restore_lr = state_dict['restore_lr']
        self.epoch, self.step = state_dict['position']
        self.rate, self.seconds, self.history = (state_dict[name] for name in ('rate', 'seconds', 'history'))

    def rank_state_dict(self) -> Dict[str, Any]:
        """The state of this process alone: its running loss and batch statistics."""
        self.losses.flush()
        buffers = [{name: b.cpu() for name, b in network.named_buffers()} for network in self.networks]
        return {'losses': (self.losses.total, self.losses.count), 'buffers': buffers}

    def load_rank_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore a state of this process."""
        self.losses = Losses(*state_dict['losses'])
        for network, buffers in zip(self.networks, state_dict['buffers'], strict=True):
            for name, buffer in network.named_buffers():
                buffer.copy_(buffers[name])
