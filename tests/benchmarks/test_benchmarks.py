"""The benchmarks run, and docs/benchmarks.md matches their records."""

import sys

import pytest

from benchmarks import __main__ as benchmarks


def test_docs_are_generated_from_the_records():
    assert benchmarks.DOCS.read_text() == benchmarks.render_docs()


SPEED = (
    'speed --model test_resnet_depla test_resnet:cbam --base test_resnet --img-size 64 --batch-size 2 --pairs 2 --amp'
)
SCALING = 'scaling --model test_resnet_depla --base test_resnet --img-size 64 96 --pairs 2'
ONNX = 'grid --model test_resnet_depla --batch-size 2 --img-size 64 --seconds 0.1 --mode onnx --record grid-onnx'
PIPELINE = 'pipeline --model test_resnet_depla --images 80 --img-size 32 --batch-size 16 --epochs 2'


@pytest.mark.parametrize(
    'arguments,expected',
    [
        ('cost --model test_resnet_depla', '| `test_resnet_depla` | 128 |'),
        (SPEED, '2 of inference and 2 of training step'),
        ('block --shape 2x32x6x7 --pairs 2', '| adaptive, (2, 32, 6, 7), contiguous | backward |'),
        (SCALING, '| non-local block |'),
        ('bound --model resnet50_depla --batch-size 8', '| `resnet50_depla` | training step | 9'),
        ('grid --model test_resnet_depla --batch-size 1 2 --img-size 64 --seconds 0.1', '| `test_resnet_depla` | 2 | '),
        (ONNX, 'CPU, onnx'),
        ('init --batch-size 2', '`rpn.logits.conv.weight`'),
        ('neck --img-size 96 --pairs 2', 'neck, training step'),
        ('feeding --rounds 2 --batch-size 4', '| torchvision v2 |'),
        pytest.param(PIPELINE, 'values of a crop', marks=pytest.mark.slow),
        pytest.param('throughput --epochs 2 --img-size 32', 'the 44 steps: the same', marks=pytest.mark.slow),
    ],
)
def test_runs_and_writes_its_record(arguments, expected, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks.record, 'FOLDER', tmp_path)
    monkeypatch.setattr(benchmarks, 'DOCS', tmp_path / 'benchmarks.md')
    monkeypatch.setattr(sys, 'argv', ['benchmarks', *arguments.split()])
    benchmarks.main()
    assert expected in capsys.readouterr().out
    docs = (tmp_path / 'benchmarks.md').read_text()
    assert expected in docs
    assert f'`python -m benchmarks {arguments.split()[0]}' in docs
    if '![' in docs:
        plot = tmp_path / 'plots' / f'{arguments.split()[0]}.svg'
        drawn = plot.read_bytes()
        benchmarks.draw_plots()
        assert drawn.startswith(b'<?xml') and plot.read_bytes() == drawn
