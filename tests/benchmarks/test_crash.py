"""The benchmark that kills training: a kill of each kind."""

import argparse

import pytest

from benchmarks import crash


@pytest.mark.slow
@pytest.mark.parametrize('processes,seed', [(1, 2), (2, 4)])  # in validation, during a write
def test_kills(processes, seed):
    """One kill each, of training with one and with two processes; `python -m benchmarks crash` has many."""
    args = dict(task='classification', epochs=2, kills=1, processes=processes, max_workers=2, seed=seed)
    results = crash.run(argparse.Namespace(**args))
    assert results['kills'] == 1 and results['identical'] == results['runs'] == 1 and results['different'] == []
