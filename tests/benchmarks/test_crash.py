"""The benchmark that kills training: a kill of each kind."""

import argparse
import shutil

import pytest

from benchmarks import crash


@pytest.mark.slow
@pytest.mark.parametrize('processes,seed', [(1, 2), (2, 4)])  # in validation, during a write
def test_kills(processes, seed, tmp_path, monkeypatch):
    """One kill each, of training with one and with two processes; `python -m benchmarks crash` has many."""
    script, folder, flags = crash.TASKS['classification']
    few = shutil.copytree(folder(), tmp_path / 'few', ignore=lambda _, names: names[::2] if len(names) > 100 else ())
    monkeypatch.setitem(crash.TASKS, 'classification', (script, lambda: few, flags))  # half the training images
    args = dict(task='classification', epochs=2, kills=1, processes=processes, max_workers=2, seed=seed)
    results = crash.run(argparse.Namespace(**args))
    assert results['kills'] == 1 and results['identical'] == results['runs'] == 1 and results['different'] == []
