"""The benchmarks run, and docs/benchmarks.md matches their records."""

import sys

import pytest

from benchmarks import __main__ as benchmarks


def test_docs_are_generated_from_the_records():
    assert benchmarks.DOCS.read_text() == benchmarks.render_docs()


@pytest.mark.parametrize(
    'arguments,expected',
    [
        (['cost', '--model', 'test_resnet_depla'], '| `test_resnet_depla` | 128 |'),
        (
            [
                'speed',
                '--model',
                'test_resnet_depla',
                'test_resnet:cbam',
                '--base',
                'test_resnet',
                '--img-size',
                '64',
                '--batch-size',
                '2',
                '--pairs',
                '2',
                '--amp',
            ],
            '6 of inference and 2 of training step',
        ),
        (['block', '--shape', '2x32x6x7', '--pairs', '2'], '| adaptive, (2, 32, 6, 7), contiguous | backward |'),
        (
            [
                'scaling',
                '--model',
                'test_resnet_depla',
                '--base',
                'test_resnet',
                '--img-size',
                '64',
                '96',
                '--pairs',
                '2',
            ],
            '| non-local block |',
        ),
        (['init', '--batch-size', '2'], '`rpn.logits.conv.weight`'),
        (['pipeline', '--images', '80', '--img-size', '32', '--batch-size', '16', '--epochs', '3'], 'values of a crop'),
        (['neck', '--img-size', '96', '--pairs', '2'], 'neck, training step'),
        (['throughput', '--epochs', '2', '--img-size', '32'], 'Learning rates of the 44 steps: the same'),
    ],
)
def test_runs_and_writes_its_record(arguments, expected, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks.record, 'FOLDER', tmp_path)
    monkeypatch.setattr(benchmarks, 'DOCS', tmp_path / 'benchmarks.md')
    monkeypatch.setattr(sys, 'argv', ['benchmarks', *arguments])
    benchmarks.main()
    assert expected in capsys.readouterr().out
    docs = (tmp_path / 'benchmarks.md').read_text()
    assert expected in docs
    assert f'`python -m benchmarks {arguments[0]}' in docs
    if '![' in docs:
        plot = tmp_path / 'plots' / f'{arguments[0]}.svg'
        drawn = plot.read_bytes()
        benchmarks.draw_plots()
        assert drawn.startswith(b'<?xml') and plot.read_bytes() == drawn
