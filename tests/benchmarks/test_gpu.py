"""The benchmark of a GPU fills each cell of its table, at toy size on a CPU."""

import json
import sys

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import gpu


def call(minutes, monkeypatch):
    monkeypatch.setattr(sys, 'argv', f'benchmarks gpu --device cpu --toy --minutes {minutes}'.split())
    benchmarks.main()


@pytest.mark.slow
def test_every_cell_in_two_calls(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks.record, 'FOLDER', tmp_path)
    monkeypatch.setattr(benchmarks, 'DOCS', tmp_path / 'benchmarks.md')
    call(0.2, monkeypatch)
    assert 'cells are left: ' in capsys.readouterr().out
    text = benchmarks.DOCS.read_text()
    first = json.loads((tmp_path / 'gpu.json').read_text())['results']['cells']
    assert 0 < len(first) < len(gpu.plan(gpu.TOY)) and 'Empty: not measured yet.' in text and ' |  |  |' in text
    call(9, monkeypatch)
    cells = json.loads((tmp_path / 'gpu.json').read_text())['results']['cells']
    assert len(cells) == len(gpu.plan(gpu.TOY)) and {name: cells[name] for name in first} == first
    assert not any('error' in cell for cell in cells.values()), cells
    rows = [line for line in benchmarks.DOCS.read_text().splitlines() if line.startswith('| ')]
    assert any('23 skipped' in row for row in rows) or any(' passed' in row for row in rows)
    assert all(any(text in row for row in rows) for text in ('the same bits', '% waiting', ' GiB'))


def test_another_card_starts_anew(monkeypatch, tmp_path):
    """A record of another card, or of other code, is not continued."""
    monkeypatch.setattr(benchmarks.record, 'FOLDER', tmp_path)
    for card, sources in (('H100', {}), ('CPU', {'benchmarks/gpu.py': 'another'})):
        results = dict(gpu.NOTHING, card=card, toy=True, cells={'resuming/4/eager': dict(kind='resuming', seconds=1)})
        (tmp_path / 'gpu.json').write_text(json.dumps(dict(results=results, sources=sources)))
        args = benchmarks.argparse.Namespace(device='cpu', toy=True, minutes=0, record='gpu')
        assert next(gpu.run(args))['cells'] == {}
