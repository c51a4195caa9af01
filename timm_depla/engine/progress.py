"""The progress of a run: a bar or log lines, TensorBoard, Weights & Biases."""

import logging
import time
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Dict, List

from tqdm import tqdm

from timm_depla.errors import ConfigError, command_for, require

from .checkpoint import checkpoint_name
from .metrics import PLAIN, Metric, choose, rank

_logger = logging.getLogger(__name__)


def progress(description: str, unit: str, **kwargs: Any) -> tqdm:
    """A progress bar on a terminal, nothing in a log."""
    return tqdm(desc=description, leave=False, disable=None, unit=f' {unit}', **kwargs)


class Report:
    """Reports the progress of a run; processes other than the primary one only log warnings."""

    def __init__(self, run: Any):
        self.run, self.args, self.state = run, run.args, run.state
        self.steps = len(run.loader)
        self.images_per_step = run.args.batch_size * run.world.size
        self.bar = None
        self._loggers = _create_loggers(run.args, run.folder.path) if run.world.is_primary else []

    def start(self) -> None:
        """Training starts at the state's position."""
        self.first, self.start_time = self.state.step, time.perf_counter()
        if self.run.world.is_primary:
            total, done = self.steps * self.images_per_step, self.first * self.images_per_step
            self.bar = progress(f'epoch {self.state.epoch}', 'images', total=total, initial=done)

    def update(self) -> None:
        """A step is done."""
        if self.bar is None:
            return
        state, step = self.state, self.state.step
        seconds = (time.perf_counter() - self.start_time) / (step - self.first)
        losses = state.losses
        loss = f'{losses.total / losses.count:.3f}' if losses.count else '-'  # the first is read with the second step
        left = timedelta(seconds=round(seconds * ((self.run.end - state.epoch) * self.steps - step)))
        if not self.bar.disable:
            self.bar.set_postfix(loss=loss, lr=f'{state.rate:.3g}', run=f'{left} left', refresh=False)
            self.bar.update(step * self.images_per_step - self.bar.n)
        elif step % self.args.log_interval == 0 and step < self.steps:
            line = 'epoch %d  step %d/%d  loss %s  lr %.3g  %.0f images/s  %s left'
            _logger.info(line, state.epoch, step, self.steps, loss, state.rate, self.images_per_step / seconds, left)

    def stop(self) -> None:
        """Training pauses: an epoch has ended, or the run is interrupted."""
        if self.bar is not None:
            self.bar.close()

    def epoch_ended(self) -> None:
        """Report the last row of the history."""
        if not self.run.world.is_primary:
            return
        row, metric = self.state.history[-1], self.args.eval_metric
        text = f'epoch {row["epoch"]}/{self.run.end - 1}  loss {row["train_loss"]:.3f}'
        for shown in self.run.metrics:
            if shown.column in row and shown.digits is not None:
                text += f'  {shown.text(row)}'
                text += f' ({self._compare(row, shown)})' if shown.name == metric else ''
        seconds = time.perf_counter() - self.start_time
        _logger.info('%s  lr %.2g  %.*f s', text, row['lr'], int(seconds < 100), seconds)
        horizon = round(1 / max(1 - self.args.model_ema_decay, 1e-9)) if self.args.model_ema else 0
        if self.run.updates < horizon and not self.args.model_ema_warmup:
            message = 'the average of %d updates still holds the start: it spans about %d'
            _logger.info(message, self.run.updates, horizon)
        for log in self._loggers:
            log(row)

    def _compare(self, row: Dict[str, Any], metric: Metric) -> str:
        """A row's value of the chosen metric without average, and the best epoch's."""
        best, plain = rank(self.state.history, metric.name)[0], f'eval_{PLAIN}{metric.name}'
        notes = [f'plain {row[plain]:.{metric.digits}f}'] if plain in row else []
        value = best[choose(best, metric.name)[1]]
        return ', '.join([*notes, 'best' if best is row else f'best {value:.{metric.digits}f}'])

    def interrupted(self) -> None:
        """Say how to resume."""
        name, command = checkpoint_name(self.state.epoch, self.state.step), command_for(self.run.train_script)
        _logger.info('saved %s; resume with: %s --resume %s', name, command, self.run.folder.path)

    def ended(self) -> None:
        """Say what was best."""
        if ranked := rank(self.state.history, self.args.eval_metric):
            best, column = ranked[0], choose(ranked[0], self.args.eval_metric)[1]
            metric = next(metric for metric in self.run.folder.metrics if metric.column == column)
            place = f'epoch {best["epoch"]} (checkpoints/{checkpoint_name(best["epoch"] + 1, 0)})'
            command = f'{command_for(self.run.validate_script)} {self.run.folder.path}'
            _logger.info('best %s at %s: %s', metric.text(best), place, command)


def check_loggers(args: Namespace) -> None:
    """Refuse a logger that is not installed, before the run has a folder."""
    for module in ('tensorboard', 'wandb'):
        if getattr(args, f'log_{module}'):
            require(module, 'log')


def _create_loggers(args: Namespace, folder: Path) -> List[Callable[[Dict[str, Any]], None]]:
    """Functions that each take a row of the summary."""
    loggers = []
    if args.log_tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        events = SummaryWriter(str(folder / 'tensorboard'))

        def log_events(row: Dict[str, Any]) -> None:
            for key, value in row.items():
                events.add_scalar(key, value, row['epoch'])
            events.flush()

        loggers.append(log_events)
    if args.log_wandb:
        import wandb

        if (folder / 'wandb' / 'settings').exists():  # it could name another server
            raise ConfigError(f"'{folder / 'wandb' / 'settings'}' would set up Weights & Biases: remove it")
        resume = dict(id=args.wandb_resume_id, resume='must') if args.wandb_resume_id else {}
        where = dict(project=args.wandb_project, name=folder.name, dir=str(folder), tags=args.wandb_tags)
        wandb.init(config=vars(args), **where, **resume)
        loggers.append(wandb.log)
    return loggers
