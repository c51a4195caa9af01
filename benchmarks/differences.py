"""What differs between two runs that should have ended alike; for the benchmark `crash` and the tests of resuming."""

from pathlib import Path
from typing import Any, Dict, List

import torch

from timm_depla.engine.checkpoint import TIMES, find_damage, read_state

from .record import read_summary


def _same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)


def _without_times(row: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES}


def _state(run: Path) -> Dict[str, Any]:
    """The last state, and the rows of summary.csv."""
    state = _without_times(read_state(run / 'last'))
    for key, rows in (('history', state['history']), ('summary.csv', read_summary(run))):
        state[key] = list(map(_without_times, rows))
    return state


def differences(run: Path, reference: Path) -> List[str]:
    """Names of what differs between the final states of two runs, but for the time that they took."""
    found = [str(folder) for folder in (run / 'last').resolve().parent.iterdir() if find_damage(folder)]
    for name in ('last/model.safetensors', 'best/model.safetensors'):
        if (run / name).read_bytes() != (reference / name).read_bytes():
            found.append(name)
    a, b = _state(run), _state(reference)
    return found + [key for key in a.keys() | b.keys() if not _same(a.get(key), b.get(key))]
