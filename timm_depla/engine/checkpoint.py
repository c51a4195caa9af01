"""Crash-safe checkpoints: written atomically, verified by checksums, and without pickles.

They are the folders `checkpoints/EPOCH-STEP` of a run, named by the position where training resumes. Each has the
weights (`model.safetensors` and timm's `config.json`, so that timm itself loads the folder), the training state
(`state.json`, with its tensors in `state.safetensors`), the metrics (`record.json`) and `checksums.json` over them all.
"""

import json
import logging
import os
import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import safetensors.torch
import torch

from timm_depla import files
from timm_depla.errors import TrainingError
from timm_depla.files import SUMS, find_change, list_sums, read_mapping, read_tensors

_logger = logging.getLogger(__name__)

TIMES = ('seconds', 'images_per_second')
"""Columns of summary.csv that no other run has alike: training of an epoch, without validation."""
LINKS = ('best', 'last', '.best.part', '.last.part')
"""Names of the links in a run's folder, each to a folder in its folder checkpoints."""
DIVERGED = 'diverged.json'
"""A file of a run's folder, from a loss that is not finite until training resumes."""
_STATE = ('state.json', 'state.safetensors')
_FILES = ('model.safetensors', 'config.json', 'record.json', *_STATE, SUMS)
_NAME = re.compile(r'(\d{4,})-(\d{6,})')


def checkpoint_name(epoch: int, step: int) -> str:
    """Folder name of the checkpoint at this position."""
    return f'{epoch:04d}-{step:06d}'


def position(folder: Path) -> Tuple[int, int]:
    """Epoch and step in a checkpoint's name."""
    epoch, step = _NAME.fullmatch(folder.name).groups()
    return int(epoch), int(step)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into a TrainingError that names the path."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write '{path}': {error.strerror or error}; earlier checkpoints are untouched. Make room, then "
            'start again with --resume auto'
        ) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically, or raise a TrainingError."""
    with writing(path):
        files.write_file(path, data)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk, on POSIX systems."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_checkpoint(folder: Path, contents: Dict[str, Any]) -> None:
    """Write a folder of files atomically, or raise a TrainingError; an intact one that exists already is kept.

    The contents are bytes, or the tensors of a safetensors file.
    """
    if folder.exists() and find_damage(folder) is None:
        return
    encode = partial(safetensors.torch.save, metadata={'format': 'pt'})
    contents = {name: data if isinstance(data, bytes) else encode(data) for name, data in contents.items()}
    scratch = folder.with_name(f'.{folder.name}.part')
    with writing(folder):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            for name, data in {**contents, SUMS: list_sums(contents)}.items():
                files.write_bytes(scratch / name, data)
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
    if change := find_change(folder):
        return change
    if missing := [name for name in _FILES if not (folder / name).is_file()]:
        return f'{", ".join(missing)} missing'
    try:
        record = read_mapping(folder / 'record.json')
        name = checkpoint_name(record['epoch'], record['step'])
    except (KeyError, TypeError, ValueError) as error:
        return f'record.json has no position ({type(error).__name__}: {error})'
    folder = folder.resolve()
    is_renamed = folder.parent.name == 'checkpoints' and folder.name != name
    return f'it is the checkpoint {name} under another name' if is_renamed else None


def list_checkpoints(run: Path) -> List[Path]:
    """A run's checkpoints, newest first."""
    found = [path for path in run.glob('checkpoints/*') if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=position, reverse=True)


def newest_checkpoint(run: Path) -> Optional[Path]:
    """The newest intact checkpoint of a run, if any; damaged ones are skipped with a warning.

    If the loss was not finite in an epoch, later weights may be useless: checkpoints after the start of that epoch are
    skipped if there are older ones.
    """
    found = list_checkpoints(run)
    if (run / DIVERGED).exists():
        try:
            epoch = int(read_mapping(run / DIVERGED)['epoch'])
            _logger.warning('the loss was not finite in epoch %d: going back to before that epoch', epoch)
            found = [folder for folder in found if position(folder) <= (epoch, 0)] or found[-1:]
        except (KeyError, OverflowError, TypeError, ValueError):
            pass  # not ours
    for folder in found:
        damage = find_damage(folder)
        if damage is None:
            return folder
        _logger.warning('%s is damaged (%s): going back to the checkpoint before it', folder, damage)
    return None


def to_cpu(value: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU: safetensors has neither channels last nor tensors that share memory."""
    return value.detach().to('cpu', copy=True).contiguous()


def pack_state(state: Dict[str, Any]) -> Dict[str, Any]:
    """The contents of the files of a state of tensors and of what JSON knows; tuples come back as lists."""
    tensors: Dict[str, torch.Tensor] = {}

    def encode(value: Any) -> Dict[str, str]:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f'no state of type {type(value).__name__}: {value!r}')
        name = str(len(tensors))
        tensors[name] = to_cpu(value)
        return {'tensor': name}

    text = json.dumps(state, default=encode) + '\n'
    return dict(zip(_STATE, (text.encode(), tensors), strict=True))


def read_state(folder: Path) -> Dict[str, Any]:
    """Read the state in a folder; a file that is missing or holds no state is a ValueError."""
    text, weights = (folder / name for name in _STATE)
    tensors = read_tensors(weights)

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {'tensor'}:
            return tensors[value['tensor']]
        return {int(k) if k.isdecimal() else k: decode(v) for k, v in value.items()}  # keys are strings in JSON

    try:
        return {key: decode(value) for key, value in read_mapping(text).items()}
    except (KeyError, RecursionError, TypeError) as error:
        raise ValueError(f'{text} and {weights.name} hold no state ({type(error).__name__}: {error})') from error
