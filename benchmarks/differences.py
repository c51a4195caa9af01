"""What differs between two runs that should have ended alike; for the benchmark `crash` and the tests of resuming."""

import csv
from pathlib import Path
from typing import Any, Dict, List

import torch

from timm_depla.engine.checkpoint import TIMES, find_damage, read_state

__all__ = ['differences']


def _same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)


def _summary(run: Path) -> List[Dict[str, str]]:
    """The rows of summary.csv without times."""
    rows = csv.DictReader((run / 'summary.csv').read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def _state(run: Path) -> Dict[str, Any]:
    """The last state without times."""
    state = read_state(run / 'last')
    state['history'] = [{key: value for key, value in row.items() if key not in TIMES} for row in state['history']]
    return {key: value for key, value in state.items() if key not in TIMES}


def differences(run: Path, reference: Path) -> List[str]:
    """Names of what differs between the final states of two runs, but for the time that they took."""
    found = [str(folder) for folder in (run / 'last').resolve().parent.iterdir() if find_damage(folder)]
    if _summary(run) != _summary(reference):
        found.append('summary.csv')
    for name in ('last/model.safetensors', 'best/model.safetensors'):
        if (run / name).read_bytes() != (reference / name).read_bytes():
            found.append(name)
    a, b = _state(run), _state(reference)
    return found + [key for key in a.keys() | b.keys() if not _same(a.get(key), b.get(key))]
