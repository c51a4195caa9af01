"""The progress of a run: a bar or log lines, TensorBoard, Weights & Biases."""

import logging
import math
import sys
import time
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List

from tqdm import tqdm

from timm_depla.errors import ConfigError, command_for, require

from .checkpoint import checkpoint_name
from .metrics import PLAIN, choose

__all__ = ['Report', 'check_loggers', 'progress']

_logger = logging.getLogger(__name__)


def progress(description: str, unit: str, **kwargs: Any) -> tqdm:
    """A progress bar on a terminal, nothing in a log."""
    return tqdm(desc=description, leave=False, disable=not sys.stderr.isatty(), unit=f' {unit}', **kwargs)


class Report:
    """Reports the progress of a run; processes other than the primary one only log warnings.

    Args:
        run: The run to report.
    """

    def __init__(self, run: Any):
        self.args = run.args
        self.steps = len(run.loader)
        self.num_epochs = run.end
        self.images_per_step = run.args.batch_size * run.world.size
        self.is_primary = run.world.is_primary
        self._loggers = _create_loggers(run.args, run.folder) if self.is_primary else []

    def start(self, epoch: int, step: int) -> None:
        """Training starts at this position."""
        self.epoch, self.first, self.start_time = epoch, step, time.perf_counter()
        total, done = self.steps * self.images_per_step, step * self.images_per_step
        self.bar = progress(f'epoch {epoch}', 'images', total=total, initial=done) if self.is_primary else None

    def update(self, step: int, loss: float, lr: float) -> None:
        """`step` steps of the epoch are done."""
        if self.bar is None:
            return
        seconds = (time.perf_counter() - self.start_time) / max(step - self.first, 1)
        text = f'{loss:.3f}' if math.isfinite(loss) else '-'  # the first is read with the second step
        left = timedelta(seconds=round(seconds * ((self.num_epochs - self.epoch) * self.steps - step)))
        if not self.bar.disable:
            self.bar.set_postfix(loss=text, lr=f'{lr:.3g}', run=f'{left} left', refresh=False)
            self.bar.update(step * self.images_per_step - self.bar.n)
        elif step % self.args.log_interval == 0 and step < self.steps:
            line = 'epoch %d  step %d/%d  loss %s  lr %.3g  %.0f images/s  %s left'
            _logger.info(line, self.epoch, step, self.steps, text, lr, self.images_per_step / seconds, left)

    def stop(self) -> None:
        """Training pauses: an epoch has ended, or the run is interrupted."""
        if self.bar is not None:
            self.bar.close()

    def epoch_ended(self, run: Any) -> None:
        """Report the last row of the history."""
        if not self.is_primary:
            return
        row, best = run.history[-1], (run.ranked(run.history) or [{}])[0]
        best_column = choose(best, self.args.eval_metric)[1] if best else None
        text = f'epoch {row["epoch"]}/{self.num_epochs - 1}  loss {row["train_loss"]:.3f}'
        for metric in run.metrics:
            if metric.column not in row or metric.digits is None:
                continue
            notes = []
            if metric.name == self.args.eval_metric:
                plain, shown = f'eval_{PLAIN}{metric.name}', f'.{metric.digits}f'
                notes += [f'plain {row[plain]:{shown}}'] if plain in row else []
                notes += ['best' if best is row else f'best {best[best_column]:{shown}}'] if best else []
            text += f'  {metric.text(row)}' + (f' ({", ".join(notes)})' if notes else '')
        seconds = time.perf_counter() - self.start_time
        _logger.info('%s  lr %.2g  %.*f s', text, row['lr'], int(seconds < 100), seconds)
        horizon = round(1 / max(1 - self.args.model_ema_decay, 1e-9)) if run.ema is not None else 0
        if run.updates < horizon and not self.args.model_ema_warmup:
            message = 'the average of %d updates still holds the start: it spans about %d'
            _logger.info(message, run.updates, horizon)
        for log in self._loggers:
            log(row)

    def ended(self, run: Any, signal: int) -> None:
        """Training has ended, by a signal or at its last epoch: say how to go on, or what was best."""
        if signal:
            name = checkpoint_name(run.epoch, run.step)
            _logger.info('saved %s; go on with: %s --resume %s', name, command_for(run.train_script), run.folder)
        elif ranked := run.ranked(run.history):
            best, column = ranked[0], choose(ranked[0], self.args.eval_metric)[1]
            metric = next(metric for metric in run.all_metrics if metric.column == column)
            place = f'epoch {best["epoch"]} (checkpoints/{checkpoint_name(best["epoch"] + 1, 0)})'
            command = f'{command_for(run.validate_script)} {run.folder}'
            _logger.info('best %s at %s: %s', metric.text(best), place, command)


def check_loggers(args: Namespace) -> None:
    """Refuse a logger that is not installed, before the run has a folder.

    Raises:
        ConfigError: If it is not.
    """
    for is_wanted, module in ((args.log_tensorboard, 'tensorboard'), (args.log_wandb, 'wandb')):
        if is_wanted:
            require(module, 'log')


def _create_loggers(args: Namespace, folder: Path) -> List[Any]:
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
        wandb.init(
            project=args.wandb_project,
            name=folder.name,
            config=vars(args),
            tags=args.wandb_tags,
            dir=str(folder),
            id=args.wandb_resume_id or None,
            resume='must' if args.wandb_resume_id else None,
        )
        loggers.append(wandb.log)
    return loggers
