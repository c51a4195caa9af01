"""Crash-safe checkpoints: written atomically, verified by checksums, never removed before the next one is complete.

They are the folders `checkpoints/EPOCH-STEP` of a run, named by the position where training resumes. Each has the
weights (`model.safetensors` and timm's `config.json`, so that timm itself loads the folder), the training state
(`state.json` and `state.safetensors`), the metrics (`record.json`) and `checksums.json` over them all. `best` and
`last` are links to two of them.
"""

import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import safetensors.torch
import torch

from timm_depla import files
from timm_depla.errors import TrainingError
from timm_depla.files import SUMS, find_change, list_sums, read_mapping, read_tensors

__all__ = [
    'LINKS', 'TIMES', 'BackgroundWriter', 'checkpoint_name', 'find_damage', 'link', 'list_checkpoints',
    'newest_checkpoint', 'pack_state', 'prune', 'read_state', 'set_aside', 'write_checkpoint', 'write_file', 'writing',
]  # fmt: skip

_logger = logging.getLogger(__name__)

TIMES = ('seconds', 'images_per_second')
"""Columns of summary.csv that no other run has alike: training of an epoch, without validation."""
LINKS = ('best', 'last', '.best.part', '.last.part')
"""Names of the links in a run's folder, each to a folder in its folder checkpoints."""
STATE = ('state.json', 'state.safetensors')
_NAME = re.compile(r'(\d{4,})-(\d{6,})')


def checkpoint_name(epoch: int, step: int) -> str:
    """Folder name of the checkpoint at this position."""
    return f'{epoch:04d}-{step:06d}'


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into a TrainingError that names the path."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write '{path}': {error.strerror or error}; earlier checkpoints are untouched. Make room, then "
            'go on with --resume auto'
        ) from error


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk, on POSIX systems."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        TrainingError: If it cannot be written, as on a full disk.
    """
    with writing(path):
        files.write_file(path, data)


def write_checkpoint(folder: Path, contents: Dict[str, bytes]) -> None:
    """Write a folder of files atomically; an intact one that exists already is kept.

    Raises:
        TrainingError: If it cannot be written.
    """
    if folder.exists() and find_damage(folder) is None:
        return
    scratch = folder.with_name(f'.{folder.name}.part')
    with writing(folder):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            for name, data in contents.items():
                files.write_bytes(scratch / name, data)
            files.write_bytes(scratch / SUMS, list_sums(contents))
            _sync(scratch)
            if folder.exists():  # damaged
                shutil.rmtree(folder)
            os.replace(scratch, folder)
            _sync(folder.parent)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def find_damage(folder: Path) -> Optional[str]:
    """Say what is wrong with a checkpoint; None if its checksums are right and its name is its position."""
    change = find_change(folder)
    if change is not None:
        return change
    missing = [name for name in ('model.safetensors', 'config.json', 'record.json', *STATE, SUMS)
               if not (folder / name).is_file()]  # fmt: skip
    if missing:
        return f'{", ".join(missing)} missing'
    try:
        record = read_mapping(folder / 'record.json')
        name = checkpoint_name(record['epoch'], record['step'])
    except (KeyError, TypeError, ValueError) as error:
        return f'record.json tells no position ({type(error).__name__}: {error})'
    is_named = folder.resolve().parent.name == 'checkpoints'
    return f'it is the checkpoint {name} under another name' if is_named and folder.resolve().name != name else None


def position(folder: Path) -> Tuple[int, int]:
    """Epoch and step in a checkpoint's name."""
    epoch, step = _NAME.fullmatch(folder.name).groups()
    return int(epoch), int(step)


def list_checkpoints(run: Path) -> List[Path]:
    """A run's checkpoints, newest first."""
    found = run / 'checkpoints'
    folders = [path for path in (found.iterdir() if found.is_dir() else ()) if _NAME.fullmatch(path.name)]
    return sorted((path for path in folders if path.is_dir()), key=position, reverse=True)


def set_aside(run: Path, epoch: int, step: int) -> Optional[Path]:
    """Move a run's checkpoints after a position to a new folder, before a changed training resumes; return the folder.

    Raises:
        TrainingError: If they cannot be moved.
    """
    later = [folder for folder in list_checkpoints(run) if position(folder) > (epoch, step)]
    if not later:
        return None
    prefix = f'replaced-after-{checkpoint_name(epoch, step)}-'
    target = run / f'{prefix}{1 + len(list(run.glob(prefix + "*")))}'
    with writing(target):
        target.mkdir()
        for folder in later:
            os.replace(folder, target / folder.name)
    return target


def newest_checkpoint(run: Path, diverged: Optional[int] = None) -> Optional[Path]:
    """The newest intact checkpoint of a run, if any; damaged ones are skipped with a warning.

    Checkpoints after the start of epoch `diverged`, in which the loss was not finite, are skipped if there are older
    ones.
    """
    found = list_checkpoints(run)
    if diverged is not None:
        _logger.warning('the loss was not finite in epoch %d: going back to before that epoch', diverged)
        found = [folder for folder in found if position(folder) <= (diverged, 0)] or found[-1:]
    for folder in found:
        damage = find_damage(folder)
        if damage is None:
            return folder
        _logger.warning('%s is damaged (%s): going back to the checkpoint before it', folder, damage)
    return None


def link(path: Path, target: Path) -> None:
    """Atomically point a symbolic link at a sibling or a folder below one.

    Raises:
        TrainingError: If it cannot be made.
    """
    scratch = path.with_name(f'.{path.name}.part')
    with writing(path):
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(target.relative_to(path.parent), target_is_directory=True)
        os.replace(scratch, path)


def prune(run: Path, keep: Iterable[str]) -> None:
    """Remove a run's checkpoints except the two newest and those in `keep`, and the rest of an interrupted write."""
    kept = set(keep)
    for folder in list_checkpoints(run)[2:]:
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    for scratch in (run / 'checkpoints').glob('.*.part'):
        shutil.rmtree(scratch, ignore_errors=True)


class BackgroundWriter:
    """Runs one job at a time in a thread; a job's error is raised at the next call."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._job: Optional[Future] = None

    def submit(self, job: Callable[..., None], *args: Any) -> None:
        """Start a job, after the one before it has ended."""
        self.wait()
        self._job = self._pool.submit(job, *args)

    def poll(self) -> None:
        """Raise the error of a job that has failed."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the job."""
        if self._job is not None:
            job, self._job = self._job, None
            job.result()


def pack_state(state: Dict[str, Any]) -> Dict[str, bytes]:
    """Encode a state of dictionaries, lists, tuples, tensors, numbers, strings and None as files."""
    tensors: Dict[str, torch.Tensor] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.contiguous()
            return {'tensor': str(len(tensors) - 1)}
        if isinstance(value, dict):  # JSON keys are only strings
            return {'dict': [[encode(key), encode(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [encode(item) for item in value]}
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise TypeError(f'no state of type {type(value).__name__}: {value!r}')
        return value

    text = json.dumps(encode(state)) + '\n'
    return dict(zip(STATE, (text.encode(), safetensors.torch.save(tensors)), strict=True))


def read_state(folder: Path) -> Dict[str, Any]:
    """Read the state in a folder.

    Raises:
        ValueError: If a file is missing or does not hold a state.
    """
    text, weights = (folder / name for name in STATE)
    kinds = {'dict': dict, 'list': list, 'tuple': tuple}
    try:
        tensors = read_tensors(weights)

        def decode(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            ((kind, content),) = value.items()
            if kind == 'tensor':
                return tensors[content]
            return kinds[kind](map(decode, content)) if kind != 'dict' else {decode(k): decode(v) for k, v in content}

        state = decode(read_mapping(text))
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f'{text} and {weights.name} hold no state ({type(error).__name__}: {error})') from error
    if not isinstance(state, dict):
        raise ValueError(f'{text} holds no state')
    return state
