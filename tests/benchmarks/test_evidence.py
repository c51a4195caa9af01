"""The study of docs/evidence.md: its data, networks and statistics, and the reproduction of a run's number."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from benchmarks.evidence import fashion, report, scattered, starts, study
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.proxies import PROXIES
from timm_depla.detection.rcnn import split_name

NARROW = [name for name, arm in ARMS.items() if arm.model.startswith('narrow_resnet')]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a Fashion-MNIST of 80 training and 20 test images in the package's files."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    folder = tmp_path / 'datasets' / 'fashion-mnist'
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (('train', 80), ('t10k', 20)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
            header = bytes([0, 0, 8, array.ndim]) + b''.join(side.to_bytes(4, 'big') for side in array.shape)
            (folder / f'{name}-{kind}-ubyte.gz').write_bytes(gzip.compress(header + array.tobytes()))
    monkeypatch.setenv('XDG_DATA_DIRS', str(tmp_path))
    return tmp_path


@pytest.fixture
def small(cache, monkeypatch):
    """A study of few images, with its own records."""
    for name, scatter in scattered.SETS.items():
        monkeypatch.setitem(scattered.SETS, name, replace(scatter, images={'train': 80, 'validation': 20}))
    monkeypatch.setattr(study, 'RECORDS', cache / 'records.jsonl')
    return cache


def test_half_a_download_is_never_taken_for_a_whole_one(cache, monkeypatch):
    half = cache / 'cache/timm_depla/fashion/FashionMNIST/raw/train-images-idx3-ubyte'
    half.parent.mkdir(parents=True)
    half.touch()
    with monkeypatch.context() as bare:
        bare.setenv('XDG_DATA_DIRS', str(cache / 'none'))
        bare.setattr(fashion.FashionMNIST, 'mirrors', ['https://localhost/'])
        for _ in range(2):
            with pytest.raises(RuntimeError, match='no Fashion-MNIST: apt install dataset-fashion-mnist'):
                fashion.fashion_folder()
    assert len(fashion.garments(False)) == 20


def test_scattered_objects(small):
    digits = scattered.SETS['digits']
    for name, kind in (('a', digits), ('b', digits), ('c', replace(digits, fragments=0))):
        scattered.write(small / name, kind)
    files = {name: sorted((small / name).rglob('*.png')) for name in 'abc'}
    assert len(files['a']) == 100 and len({path.parent for path in files['a']}) == 20
    same = [a.read_bytes() == b.read_bytes() for a, b in zip(files['a'], files['b'], strict=True)]
    assert all(same) and len({path.read_bytes() for path in files['a']}) == 100
    ink = {name: np.mean([np.asarray(scattered.Image.open(path)) for path in files[name]]) for name in 'ac'}
    assert ink['a'] > 1.1 * ink['c']
    lit = [np.asarray(scattered.Image.open(path)) for path in scattered.cached('garments').rglob('*.png')]
    assert len(lit) == 100 and np.std([image.mean() for image in lit]) > 40


def test_control_has_as_many_parameters():
    for proxy in PROXIES.values():
        count = {}
        for name in ('base', 'depla', 'pooled'):
            model = timm.create_model(ARMS[name].model, device='meta', **ARMS[name].kwargs, **proxy.kwargs)
            count[name] = sum(parameter.numel() for parameter in model.parameters())
        assert count['pooled'] - count['base'] == pytest.approx(count['depla'] - count['base'], rel=0.01)


@pytest.mark.parametrize('name', ARMS)
def test_arms_exist(name):
    arm = ARMS[name]
    if arm.task == 'classification':
        for proxy in PROXIES.values():
            kwargs = {**arm.kwargs, **(proxy.kwargs if name in NARROW else {})}
            assert timm.create_model(arm.model, device='meta', num_classes=10, in_chans=1, **kwargs).num_classes == 10
    else:
        assert split_name(arm.model)[2].startswith('fpn')


@pytest.mark.parametrize('data,arm', [('digits', 'adaptive'), ('garments', 'nl'), ('fashion', 'depla-sgd')])
def test_a_run_gives_its_number_again(data, arm, small):
    job = study.Job(data, arm, 3, 0.003)
    first, again = study.train(job), study.train(job)
    assert first['results'] == again['results'] == study.load(job)['results']
    assert first['command'] == f'python -m benchmarks.evidence train {data} {arm} --seed 3 --lr 0.003'
    assert study.train(job._replace(seed=4))['results'] != first['results']


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_a_run_without_its_gpu_says_so(small):
    with pytest.raises(SystemExit, match=r"--device cuda failed:\nbenchmarks.evidence: error: cannot use .*'cuda'"):
        study.run('scenes', ['fpn'], 1, 'cuda')
    assert not study.RECORDS.exists()


def fake(data, arm, seed, rate, score):
    """Put a run on record."""
    study.save(dict(data=data, arm=arm, seed=seed, lr=rate, results={study.metric(arm): [0.0, score]}))


def tune(data, arm, rate, score):
    for seed in study.TUNING_SEEDS:
        fake(data, arm, seed, rate, score)


def test_insertion_starts_as_the_base_ended(small):
    """Both arms start from the base of their seed, which is trained once."""
    with pytest.raises(SystemExit, match='run garments base'):
        study.train(study.Job('garments', 'inserted', 0, 1e-6))
    for rate in study.RATES[:4]:
        tune('garments', 'base', rate, 90 - rate)
    jobs = [study.Job('garments', arm, 0, 1e-6) for arm in ('again', 'inserted')]
    first, second = (study.train(job)['results']['train_loss'][0] for job in jobs)
    trunks = list((small / 'cache' / 'timm_depla' / 'trunks').iterdir())
    assert [folder.name.rpartition('-')[0] for folder in trunks] == ['garments-base-0-0.001']
    assert first == pytest.approx(second, rel=1e-5)  # of the only batch of an epoch, before the first update


def test_grid_goes_on_beyond_a_best_rate_at_its_edge(small):
    assert study.tuning('digits', 'base') == {0.003: None, 0.009: None, 0.027: None}
    assert list(study.tuning('digits', 'base-sgd')) == [0.027, 0.081, 0.243]
    for rate, top1 in ((0.003, 88.0), (0.009, 90.0), (0.027, 89.0)):
        tune('digits', 'base', rate, top1)
        tune('digits', 'se', rate, -top1 if rate == 0.009 else rate)
    assert study.best_rate('digits', 'base') == 0.009 and study.best_rate('garments', 'base') is None
    assert study.best_rate('digits', 'se') is None and study.tuning('digits', 'se')[0.081] is None
    tune('digits', 'se', 0.081, 0.0)
    assert study.best_rate('digits', 'se') == 0.027  # and if it were not:
    tune('digits', 'se', 0.081, 1.0)
    assert study.best_rate('digits', 'se') is None and study.tuning('digits', 'se')[0.243] is None
    tune('digits', 'se', 0.081, 0.0)
    assert study.final_jobs('digits', 'se')[-1] == study.Job('digits', 'se', 9, 0.027)


def test_tables(small, monkeypatch):
    for arm, gain in (('base', 0.0), ('depla', 3.0), ('adaptive', -3.0), ('pooled', 3.01)):
        for rate in study.RATES:
            tune('digits', arm, rate, 90 + rate)
        for seed in range(10):
            fake('digits', arm, seed, study.RATES[-1], 85 + gain + seed % 5)
    assert study.best_rate('digits', 'base') == study.RATES[-1] and study.best_rate('digits', 'se') is None
    # ten seeds each, of a standard deviation of 1.491: an error of 1.491 sqrt(2 / 10) = 0.667, times 2.101
    found = report.difference('digits', 'depla', 'base')
    assert (found.mean, found.half) == pytest.approx((3.0, 1.401), abs=1e-3)
    text = report.claims()
    assert '| digits | DEPLA less base | +3.00 ± 1.40 | < 0.001 | +1.7 | **gains** |' in text
    assert '| digits | adaptive DEPLA less base | -3.00 ± 1.40 | < 0.001 | +1.9 | **costs** |' in text
    assert '| digits | DEPLA less control: pooled bottleneck | -0.01 ± 1.40 | 0.988 |  | **undecided** |' in text
    assert len(text.splitlines()) == 5 and len(report.calibration().splitlines()) == 2
    for name in report.PAGES:
        (small / name).write_text(
            '\n\n'.join(f'<!-- {mark} -->\n\n<!-- end -->' for mark in ('claims', 'networks', 'tuning'))
        )
    monkeypatch.setattr(report, 'DOCS', small)
    report.write()
    once = (small / 'evidence.md').read_text()
    report.write()
    assert (small / 'evidence.md').read_text() == once and once.count('<!-- end -->') == 3
    assert (
        '| digits | base | 0.825 | 2.187 | 87.00 ± 1.07 | 85.00 86.00 ' in once and (small / 'evidence.svg').is_file()
    )


def test_holm():
    """Of p values 0.01, 0.04, 0.03 and 0.005: times 4 the least, then 3, 2 and 1, none below the one before."""
    found = [report.Difference(1.0, 1.0, p) for p in (0.01, 0.04, 0.03, 0.005)]
    assert report.correct([*found, None]) == pytest.approx([0.03, 0.06, 0.06, 0.02, None])
    assert [report.verdict(found[0], p) for p in (0.03, 0.06, None)] == ['gains', 'undecided', 'not run']


def test_starts_of_detectors(tmp_path, monkeypatch):
    monkeypatch.setattr(starts, 'RECORDS', tmp_path / 'starts.jsonl')
    monkeypatch.setattr(starts, 'STEPS', 2)
    for variant in starts.VARIANTS[:2]:
        starts.measure(variant, 0)
    plain, large = (json.loads(line)['results'] for line in starts.RECORDS.read_text().splitlines())
    assert large['features'] == plain['features'] and large['pyramid'] == pytest.approx(3 * plain['pyramid'], rel=1e-3)
    assert large['loss_mask'] > 1.5 * plain['loss_mask'] > 0
    rows = starts.starts().splitlines()[2:]
    assert [row.split(' | ')[0] for row in rows] == ['| ResNet', '| ResNet, features times 3']


def test_docs_are_what_the_records_say():
    parts = dict(
        evidence=('calibration', 'claims', 'detection'),
        protocol=('networks', 'tuning'),
        search=('conditioning', 'starts', 'seeds', 'search'),
    )
    for name, tables in parts.items():
        text = (report.DOCS / f'{name}.md').read_text()
        for part in tables:
            assert f'<!-- {part} -->' not in text or getattr(report, part)() in text
