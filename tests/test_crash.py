"""The benchmark that kills training: one kill of one process and of two."""

import argparse

import pytest

from benchmarks import crash


@pytest.mark.parametrize('processes', [1, 2])
def test_kills(processes):
    """A kill during a write; `python -m benchmarks crash` has many, at any moment."""
    results = crash.run(argparse.Namespace(task='classification', kills=1, processes=processes, max_workers=2, seed=3))
    assert results['kills'] == 1
    assert results['different'] == []
    assert results['identical'] == results['runs'] == 1
