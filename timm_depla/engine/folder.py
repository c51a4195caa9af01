"""The folder of a run: one process has it at a time, and its files agree with the newest checkpoint."""

import csv
import io
import json
import logging
import os
import platform
import shutil
import time
from argparse import Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import yaml
from filelock import FileLock, Timeout
from timm.models import safe_model_name

from timm_depla.errors import ConfigError
from timm_depla.files import check_own, escape, open_to_append
from timm_depla.timm_runs import read_timm_run

from . import checkpoint
from .checkpoint import checkpoint_name, find_damage, list_checkpoints, position, write_file, writing
from .config import updated
from .curves import draw_curves
from .distributed import World
from .metrics import Metric, rank

_logger = logging.getLogger(__name__)

LOCK_SECONDS = 20.0  # to wait for the lock, which the workers of a killed process hold a while longer


def run_path(args: Namespace) -> Path:
    """The folder of a run: `args.output`/`args.experiment`, by default with a name of time and model."""
    if '..' in Path(args.experiment).parts or Path(args.experiment).is_absolute():
        raise ConfigError(f"--experiment '{args.experiment}' is not in --output '{args.output}': name a folder there")
    return Path(args.output) / (args.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{safe_model_name(args.model)}')


class RunFolder:
    """A run's folder: args.yaml, log.txt, summary.csv, curves.png, checkpoints/ and the links best and last to them.

    Only the primary process writes, its checkpoints in a thread. `metrics` are those of the summary.
    """

    def __init__(self, path: Path, args: Namespace, metrics: Sequence[Metric]):
        self.path, self.args, self.metrics = path, args, metrics
        self._writer = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._written: Optional[Future] = None

    @contextmanager
    def open(self, is_resumed: bool) -> Iterator[None]:
        """Create and lock the folder, write args.yaml, and add to log.txt what is logged meanwhile.

        ConfigError if it already holds another run, another process locks it, or it cannot be written.
        """
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=is_resumed or self.args.resume == 'auto')
            check_own(path, checkpoint.LINKS)
            (path / 'checkpoints').mkdir(exist_ok=True)
            open_to_append(path / '.lock').close()
            log = open_to_append(path / 'log.txt')
        except FileExistsError as error:
            todo = 'resume it by --resume auto, or choose another --experiment or --output'
            raise ConfigError(f"run folder '{path}' exists: {todo}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write run folder '{path}': {error}") from error
        with log, self._lock(), _logged_to(log):
            write_file(path / '.holder', f'process {os.getpid()} on {platform.node()}'.encode())
            write_file(path / 'args.yaml', yaml.safe_dump(vars(self.args), sort_keys=False).encode())
            yield

    def _lock(self) -> Any:
        holder = self.path / '.holder'
        try:
            return FileLock(self.path / '.lock').acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            who = holder.read_text() if holder.is_file() else 'another process'
            raise ConfigError(f"run folder '{self.path}' is in use by {who}: let it end or name another") from error

    def save(self, state: Dict[str, Any], weights: Dict[str, torch.Tensor], config: bytes) -> None:
        """Write a checkpoint in the background, after the one before it, whose error is raised.

        The weights, of model.safetensors, are contiguous and not written to meanwhile.
        """
        (epoch, step), history = state['position'], list(state['history'])
        record = {**(history or [{}])[-1], 'epoch': epoch, 'step': step}
        contents = {
            'model.safetensors': weights,
            'config.json': config,
            'record.json': (json.dumps(record, indent=2) + '\n').encode(),
            **checkpoint.pack_state(state),
        }
        name = checkpoint_name(epoch, step)

        def write() -> None:
            checkpoint.write_checkpoint(self.path / 'checkpoints' / name, contents)
            self.publish(name, history)

        self.wait()
        self._written = self._writer.submit(write)

    def wait(self, is_blocking: bool = True) -> None:
        """Wait for the checkpoint that is being written, and raise its error."""
        if self._written is not None and (is_blocking or self._written.done()):
            written, self._written = self._written, None
            written.result()

    def publish(self, name: str, history: List[Dict[str, Any]]) -> None:
        """Update summary, curves and links to the newest checkpoint, and remove checkpoints no longer needed."""
        text = io.StringIO()
        columns = ['epoch', 'train_loss', *(metric.column for metric in self.metrics), 'lr', *checkpoint.TIMES]
        writer = csv.DictWriter(text, columns, restval='', extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows(history)
        write_file(self.path / 'summary.csv', text.getvalue().encode())
        if curves := draw_curves(history, self.metrics):
            write_file(self.path / 'curves.png', curves)
        self._link('last', name)
        ranked = [checkpoint_name(row['epoch'] + 1, 0) for row in rank(history, self.args.eval_metric)]
        if ranked and (self.path / 'checkpoints' / ranked[0]).is_dir():
            self._link('best', ranked[0])
        kept = ranked[: max(self.args.checkpoint_hist, 1)]
        self.prune([*kept, *(checkpoint_name(epoch, 0) for epoch in self.args.save_epochs)])

    def _link(self, name: str, target: str) -> None:
        """Atomically link to a checkpoint."""
        path, scratch = self.path / name, self.path / f'.{name}.part'
        with writing(path):
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(Path('checkpoints', target), target_is_directory=True)
            os.replace(scratch, path)

    def prune(self, keep: Sequence[str]) -> None:
        """Remove the checkpoints except the two newest and those in `keep`, and the rest of an interrupted write."""
        removed = [folder for folder in list_checkpoints(self.path)[2:] if folder.name not in keep]
        for folder in [*removed, *self.path.glob('checkpoints/.*.part')]:
            shutil.rmtree(folder, ignore_errors=True)

    def rejoin(self, name: str, history: List[Dict[str, Any]], is_changed: bool) -> bool:
        """Make the folder agree with the checkpoint that training resumes from; returns whether it has that one.

        If the training has changed or diverged, later checkpoints are moved to a new folder.
        """
        diverged, start = self.path / checkpoint.DIVERGED, self.path / 'checkpoints' / name
        later = [folder for folder in list_checkpoints(self.path) if position(folder) > position(start)]
        if later and (is_changed or diverged.is_file()):
            prefix = f'replaced-after-{name}-'
            target = self.path / f'{prefix}{1 + len(list(self.path.glob(prefix + "*")))}'
            with writing(target):
                target.mkdir()
                for folder in later:
                    os.replace(folder, target / folder.name)
            _logger.warning('the checkpoints after %s are in %s now', name, target)
        if start.is_dir():
            self.publish(name, history)
        with writing(diverged):
            diverged.unlink(missing_ok=True)
        if (self.path / 'best').exists() and (damage := find_damage(self.path / 'best')):
            _logger.warning('the best checkpoint so far is damaged: %s', damage)
        return start.is_dir()


@contextmanager
def _logged_to(file: BinaryIO) -> Iterator[None]:
    """Add to a file what is logged meanwhile, and the error that ends it."""
    handler = logging.StreamHandler(io.TextIOWrapper(file, 'utf-8', 'backslashreplace'))
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
    handler.handleError = lambda record: None  # a full disk is told by what must be written
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            handler.stream.write(f'{type(error).__name__}: {escape(str(error), is_list=True)}\n')
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):
            handler.stream.close()


def find_resume(args: Namespace, world: World) -> Tuple[Namespace, Optional[Path]]:
    """The arguments, with output and experiment of the resumed run, and the checkpoint to resume from, if any."""
    if not args.resume:
        return args, None
    path = Path(args.resume)
    if args.resume == 'auto':
        if not args.experiment:
            raise ConfigError('--resume auto resumes a run by name: add --experiment, or give its folder')
        path = Path(args.output) / args.experiment
    elif path.resolve().parent.name == 'checkpoints':
        if path.is_symlink() and path.resolve().parents[1] != path.parent.resolve():
            raise ConfigError(f"'{path}' is a link to another run: name '{path.resolve()}' itself")
        path = path.resolve()
    is_checkpoint = path.parent.name == 'checkpoints'
    if is_checkpoint and (damage := find_damage(path)):
        raise ConfigError(f"'{path}' is no whole checkpoint ({damage}): give the run's folder for its newest one")
    newest = world.broadcast(path if is_checkpoint else checkpoint.newest_checkpoint(path))
    if newest is None and args.resume != 'auto':
        instead = "give a run's folder"
        if found := read_timm_run(args.resume):
            instead = (
                f"timm's do not tell where in the data to resume; start from it: --initial-checkpoint {found.file}"
            )
        raise ConfigError(f"'{args.resume}' has no checkpoint to resume from: {instead}")
    run = newest.parent.parent if newest is not None else path
    return updated(args, output=str(run.parent), experiment=run.name), newest
