"""The study of docs/evidence.md: its data, networks and statistics, and the reproduction of a run's number."""

import numpy as np
import pytest
import timm

from benchmarks.evidence import report, scattered, study
from benchmarks.evidence.arms import ARMS
from timm_depla.detection.rcnn import split_name


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of few images, with its own records."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(scattered, 'IMAGES', {'train': 80, 'validation': 40})
    monkeypatch.setattr(study, 'RECORDS', tmp_path / 'records.jsonl')
    recipe = tmp_path / 'small.yaml'
    recipe.write_text(f'base: {study.RECIPE}\nepochs: 1\nwarmup_epochs: 0\nimg_size: 64\nbatch_size: 40\n')
    monkeypatch.setattr(study, 'RECIPE', recipe)
    return tmp_path


def test_scattered_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(scattered, 'IMAGES', {'train': 40, 'validation': 20})
    for name, difficulty in (('a', 1.0), ('b', 1.0), ('c', 0.0)):
        scattered.write(tmp_path / name, difficulty)
    files = {name: sorted((tmp_path / name).rglob('*.png')) for name in 'abc'}
    assert len(files['a']) == 60 and len({path.parent for path in files['a']}) == 20
    same = [a.read_bytes() == b.read_bytes() for a, b in zip(files['a'], files['b'], strict=True)]
    assert all(same) and len({path.read_bytes() for path in files['a']}) == 60
    ink = {name: np.mean([np.asarray(scattered.Image.open(path)) for path in files[name]]) for name in 'ac'}
    assert ink['a'] > 1.1 * ink['c']


def test_control_has_as_many_parameters():
    count = {}
    for name in ('base', 'depla', 'pooled'):
        model = timm.create_model(ARMS[name].model, device='meta', **ARMS[name].kwargs)
        count[name] = sum(parameter.numel() for parameter in model.parameters())
    assert count['pooled'] - count['base'] == pytest.approx(count['depla'] - count['base'], rel=0.01)


@pytest.mark.parametrize('name', ARMS)
def test_arms_exist(name):
    arm = ARMS[name]
    if arm.task == 'classification':
        assert timm.create_model(arm.model, device='meta', num_classes=10, in_chans=1, **arm.kwargs).num_classes == 10
    else:
        assert split_name(arm.model)[2].startswith('fpn')


def test_a_run_gives_its_number_again(small):
    job = ('adaptive', 3, 0.003)
    first, again = study.train(job), study.train(job)
    assert first['results'] == again['results'] == study.load(job)['results']
    assert first['command'] == 'python -m benchmarks.evidence train adaptive --seed 3 --lr 0.003'
    assert study.train(('adaptive', 4, 0.003))['results'] != first['results']


def fake(arm, seed, rate, top1):
    """Put a run on record."""
    results = {report.TOP1: [0.0, top1], report.LOSS: [1.0, 0.25]}
    results |= {f'eval_{kind}{name}': [0.0, top1 / 100] for kind in ('', 'mask_') for name in report.DETECTION}
    study.save(dict(arm=arm, seed=seed, lr=rate, results=results))


def test_grid_goes_on_beyond_a_best_rate_at_its_edge(small):
    assert study.tuning('base') == {0.003: None, 0.009: None, 0.027: None}
    for rate, top1 in ((0.003, 88.0), (0.009, 90.0), (0.027, 89.0)):
        fake('base', study.TUNING_SEED, rate, top1)
        fake('se', study.TUNING_SEED, rate, -top1 if rate == 0.009 else rate)
    assert study.best_rate('base') == study.best_rate('base-long') == 0.009
    assert study.best_rate('se') is None and study.tuning('se')[0.081] is None
    fake('se', study.TUNING_SEED, 0.081, 0.0)
    assert study.best_rate('se') == 0.027  # and if it were not:
    fake('se', study.TUNING_SEED, 0.081, 1.0)
    assert study.best_rate('se') is None and study.tuning('se')[0.243] is None
    fake('se', study.TUNING_SEED, 0.081, 0.0)
    assert study.final_jobs('se')[-1] == ('se', 4, 0.027)


def test_tables(small, monkeypatch):
    measured = '| DEPLA is better than the base | DEPLA less base, top1 | +1.7 |'
    assert f'{measured} not run | **not run** |' in report.claims()
    for arm, gain in (('base', 0.0), ('depla', 3.0), ('adaptive', -3.0), ('pooled', 3.01)):
        for rate in study.RATES:
            fake(arm, study.TUNING_SEED, rate, 90 + rate)
        for seed in study.SEEDS['classification']:
            fake(arm, seed, study.RATES[-1], 85 + gain + seed)
    assert study.best_rate('base') == study.RATES[-1] and study.best_rate('se') is None
    # each of five seeds with a standard deviation of 1.581: an error of 1.581 sqrt(2 / 5) = 1, times 2.306
    assert report.difference('depla', 'base', report.TOP1) == pytest.approx((3.0, 2.306), abs=1e-3)
    for arm, precision in (('fpn', 30.0), ('fpn-depla-0.5', 32.5)):
        for seed in study.SEEDS['detection']:
            fake(arm, seed, None, precision + seed * (1 if arm == 'fpn' else 0.5))
    text = report.claims()
    # three seeds of 0.5 and of 1: an error of sqrt(1.25 / 3) and Welch's 2.94 degrees of freedom, for which t is 3.22
    assert '| FPN-DEPLA, T = 0.5 less FPN, AP | +1.1 | +2.00 ± 2.08 | **undecided** |' in text
    assert f'{measured} +3.00 ± 2.31 | **confirmed** |' in text
    assert '| adaptive DEPLA less base, top1 | +1.9 | -3.00 ± 2.31 | **refuted** |' in text
    assert '| -0.01 ± 2.31 | **undecided** |' in text and '| not run | **not run** |' in text
    monkeypatch.setattr(report, 'DOCS', small / 'evidence.md')
    monkeypatch.setattr(report, 'PLOT', small / 'evidence.svg')
    marks = [f'<!-- {name} -->\n\n<!-- end -->' for name in ('claims', 'classification', 'detection', 'tuning')]
    report.DOCS.write_text('\n\n'.join(marks))
    report.write()
    once = report.DOCS.read_text()
    report.write()
    assert report.DOCS.read_text() == once and once.count('<!-- end -->') == 4
    assert '| 0.250 |' in once and '| 90.00 ± 1.96 | +3.00 ± 2.31 (base) |' in once and report.PLOT.is_file()


def test_docs_are_what_the_records_say():
    text = report.DOCS.read_text()
    assert report.conditioning() in text and report.search() in text
