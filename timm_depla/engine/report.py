"""Reports of a run: progress bar or log lines, curves.png, TensorBoard, Weights & Biases, unreadable images."""

import io
import logging
import math
import queue
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from tqdm import tqdm

from timm_depla.data import UnreadableError
from timm_depla.errors import ConfigError, TrainingError, command_for, require
from timm_depla.files import check_writable, write_file

from .checkpoint import checkpoint_name

__all__ = [
    'PLAIN', 'Metric', 'Report', 'UnreadableImages', 'check_loggers', 'check_results', 'choose', 'draw_curves',
    'explain_worker', 'max_unreadable', 'progress', 'write_results',
]  # fmt: skip

_logger = logging.getLogger(__name__)

PLAIN = 'plain_'  # before the names of the metrics of the weights without averaging


def max_unreadable(num_images: int) -> int:
    """How many of so many images may be unreadable: 1%, but at least one."""
    return max(1, num_images // 100)


@dataclass(frozen=True)
class Metric:
    """A metric of validation, the column eval_NAME of summary.csv.

    Attributes:
        name: Its name for `--eval-metric`; lower is better for 'loss', higher for all others.
        label: Its name in logs and curves.
        panel: The title of its curves.
        digits: Decimals in the log; None leaves it out of the log.
    """

    name: str
    label: str
    panel: str
    digits: Optional[int] = None

    @property
    def column(self) -> str:
        return f'eval_{self.name}'

    def text(self, row: Dict[str, Any]) -> str:
        """Label and value in a row of the summary."""
        return f'{self.label} {row[self.column]:.{self.digits or 3}f}'


def choose(row: Dict[str, Any], metric: str) -> Tuple[float, str]:
    """The better of a row's two values of a metric, the lower the better, and its column."""
    sign = 1 if metric == 'loss' else -1
    columns = [column for column in (f'eval_{metric}', f'eval_{PLAIN}{metric}') if column in row]
    values = [sign * row[column] if math.isfinite(row[column]) else math.inf for column in columns]
    return min(zip(values, columns, strict=True), key=lambda pair: pair[0])


def progress(description: str, unit: str, **kwargs: Any) -> tqdm:
    """A progress bar on a terminal, nothing in a log."""
    return tqdm(desc=description, leave=False, disable=not sys.stderr.isatty(), unit=f' {unit}', **kwargs)


def check_results(path: str) -> None:
    """Check that `--results-file` can be written, before the work is done.

    Raises:
        ConfigError: If its folder is missing or not writable.
    """
    try:
        if path:
            check_writable(Path(path))
    except ValueError as error:
        raise ConfigError(f'--results-file: {error}') from error


def write_results(path: str, text: str) -> None:
    """Write a `--results-file`.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        write_file(Path(path), text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write --results-file '{path}': {error.strerror or error}") from error


class UnreadableImages:
    """Names and counts the images that were skipped.

    Args:
        names: The queue of (file, cause), or None if the data set reports none.
        num_images: Images of the split.
        split: Its name.
    """

    def __init__(self, names: Any, num_images: int, split: str):
        self.names = names
        self.num_images = num_images
        self.split = split
        self.files: Dict[str, str] = {}

    def collect(self, wait: bool = False) -> None:
        """Log what was skipped since the last call.

        Raises:
            TrainingError: If more of the split than `max_unreadable` cannot be read.
        """
        while self.names is not None:
            try:
                file, cause = self.names.get(timeout=0.05) if wait else self.names.get_nowait()
            except queue.Empty:
                break
            if file not in self.files:
                self.files[file] = cause
                _logger.warning('skipped an unreadable image, %d so far: %s: %s', len(self.files), file, cause)
        if len(self.files) > max_unreadable(self.num_images):
            named = '; '.join(f'{file}: {cause}' for file, cause in list(self.files.items())[:5])
            raise TrainingError(
                f"{len(self.files)} of the {self.num_images} images of the split '{self.split}' cannot be read, more "
                f'than 1%: {named}. Replace or remove them'
            )


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


def explain_worker(error: Exception) -> str:
    """Say in a sentence why data loading failed."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    cause = lines[-1] if isinstance(error, UnreadableError) or 'Traceback' in str(error) else lines[0]
    died = 'killed' in cause or 'exited unexpectedly' in cause
    hint = 'If it was killed, memory may have run out: lower --workers' if died else 'Mend the data'
    if 'auto_augment.py' in str(error) or 'transforms.py' in str(error):
        hint = 'The image was read, but its augmentation failed: choose another --aa, or leave it out'
    return f'loading data failed: {cause.rstrip(".")}. {hint}, and go on with --resume auto'


def draw_curves(history: List[Dict[str, Any]], metrics: Sequence[Metric]) -> bytes:
    """Loss, metrics and learning rate by epoch, as a PNG file; empty without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        return b''
    panels: Dict[str, Dict[str, Optional[str]]] = {'loss': {'train_loss': 'training'}}
    for metric in metrics:
        panels.setdefault(metric.panel, {})[metric.column] = metric.label
    panels['learning rate'] = {'lr': None}
    figure = Figure(figsize=(4 * len(panels), 3.5))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.14, top=0.91, wspace=0.2)
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        shown: List[float] = []
        for column, label in columns.items():
            rows = [row for row in history if column in row]
            axes.plot([row['epoch'] for row in rows], [row[column] for row in rows], '.-', label=label)
            shown += [row[column] for row in rows[1:] if math.isfinite(row[column])]
        axes.set(xlabel='epoch', title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        # the first epoch of a longer run would flatten the rest
        if title == 'loss' and shown and len(history) > 5 and axes.get_ylim()[1] > 3 * max(shown):
            axes.set_ylim(min(shown) - 0.1 * max(shown), 1.3 * max(shown))
        if title != 'learning rate':
            axes.legend(frameon=False)
        else:
            axes.ticklabel_format(axis='y', scilimits=(-2, 3))
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=100)
    return data.getvalue()


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
