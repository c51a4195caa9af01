"""The benchmarks run, their records name the code that they measured, and docs/benchmarks.md is made of them."""

import multiprocessing
import shlex
import sys
from html import escape

import pytest
from torch._inductor import config as inductor

from benchmarks import __main__ as benchmarks
from benchmarks import record

SPEED = 'speed --model test_resnet_depla test_resnet:cbam test_resnet_depla+fused --base test_resnet --amp'
GRID = 'grid --model test_resnet_depla --img-size 64 --seconds 0.1 --batch-size'
KERNELS = 'kernels --model test_resnet_depla --base test_vit --img-size 64 --batch-size 2'
PIPELINE = 'pipeline --model test_resnet_depla --images 80 --img-size 32 --batch-size 16 --epochs 2'
FORKSERVER = multiprocessing.get_context('forkserver')
FORKSERVER.set_forkserver_preload(['timm_depla.engine.classification.train'])


def test_docs_are_generated_from_the_records():
    """After a change of measured code, `python -m benchmarks docs` marks the records."""
    assert benchmarks.DOCS.read_text() == benchmarks.render_docs()
    for name in record.names():
        assert (record.FOLDER / f'{name}.json').read_text() == record.format_record(record.load(name)) + '\n'


@pytest.mark.parametrize(
    'arguments,expected',
    [
        ('cost --model resnet50_depla', '| `resnet50_depla` | 4.18 | 1.022 |'),
        (f'{SPEED} --img-size 64 --batch-size 2 --pairs 2', 'Batch 2 at 64 pixels, CPU, bfloat16; 2 turns.'),
        ('bound --model resnet50_depla --batch-size 8', '| `resnet50_depla` | 1.0'),
        (f'{GRID} 1 2 --path plain fused', '| `test_resnet_depla` | 2 | '),
        (f'{GRID} 2 --mode onnx --record grid-onnx', 'CPU, onnx'),
        ('insertion --model test_vit*', '0 of 5 networks take DEPLA. What the others do: 5 works on tokens'),
        ('neck --img-size 96 --pairs 2 --path plain', 'pyramid, training step'),
        ('feeding --pairs 2 --batch-size 4', '| torchvision v2 |'),
        pytest.param(KERNELS, '| a block | 1', marks=pytest.mark.slow),
        pytest.param(PIPELINE, 'of the values of a crop', marks=pytest.mark.slow),
        pytest.param('throughput --epochs 2 --img-size 32', 'the 44 steps: the same', marks=pytest.mark.slow),
    ],
)
def test_runs_and_writes_its_record(arguments, expected, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, 'FOLDER', tmp_path)
    monkeypatch.setattr(benchmarks, 'DOCS', tmp_path / 'benchmarks.md')
    monkeypatch.setattr(sys, 'argv', ['benchmarks', *arguments.split()])
    if arguments == PIPELINE:  # its nine processes import once
        monkeypatch.setattr(multiprocessing, 'get_context', lambda _: FORKSERVER)
    with inductor.patch({'aot_inductor.debug_compile': True, 'cpp.simdlen': 1}):  # C++ that compiles sooner, as counted
        benchmarks.main()
    assert expected in capsys.readouterr().out
    assert [record.changes(record.load(name)) for name in record.names()] == [[]]
    docs = (tmp_path / 'benchmarks.md').read_text()
    assert expected in docs and f'<code>python -m benchmarks {escape(shlex.join(arguments.split()))}</code>; ' in docs


def test_fused_form_has_no_training_step():
    names, sizes = ['a', 'a+fused', 'b'], dict(batch_size=1, img_size=2, device='cpu', amp=False, torchcompile=False)
    results = {'inference': [[2, 3, 1]], 'training step': [[4, 1]], 'names': names, 'peak memory': [5, 1], **sizes}
    assert '| `a+fused` | 3.000 s | 3.000 (3.000 to 3.000) |  |  |' in benchmarks.BENCHMARKS['speed'].render(results)


@pytest.mark.parametrize('name', ['speed-x', 'grids', 'grid-../x', ''])
def test_record_of_another_name_is_refused_before_it_is_timed(name, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks.BENCHMARKS['grid'], 'run', None)
    monkeypatch.setattr(sys, 'argv', ['benchmarks', 'grid', '--record', name])
    with pytest.raises(SystemExit):
        benchmarks.main()
    assert f"--record must be 'grid' or 'grid-SUFFIX', not '{name}'" in capsys.readouterr().err


def test_a_record_tells_which_code_has_changed_since(monkeypatch, tmp_path):
    code = '"""About."""\n\n\ndef run(x):\n    return x + 1  # one more\n\n\ndef render(x):\n    return str(x)\n'
    same = code.replace('About', 'Other').replace('  # one more', '').replace('str(x)', 'repr(x)')
    monkeypatch.setattr(record, 'ROOT', tmp_path)
    (tmp_path / 'folder').mkdir()
    entry = None
    for text, changed in ((code, []), (same, []), (code.replace('1', '2'), ['a.py', 'folder'])):
        for path in ('a.py', 'folder/b.py'):
            (tmp_path / path).write_text(text)
        record.digest.cache_clear()
        entry = entry or {'sources': {source: record.digest(source) for source in ('a.py', 'folder')}}
        assert record.changes(entry) == changed
    (tmp_path / 'folder' / 'b.py').rename(tmp_path / 'folder' / 'c.py')
    record.digest.cache_clear()
    assert record.changes({'sources': entry['sources']}) == ['a.py', 'folder'] and record.changes({}) is None
    record.digest.cache_clear()
