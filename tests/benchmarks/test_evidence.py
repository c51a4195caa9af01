"""The study of docs/evidence.md: its data, networks and statistics, and the reproduction of a run's number."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage

from benchmarks.evidence import drawn, fashion, report, study
from benchmarks.evidence.instruments import INSTRUMENTS
from benchmarks.evidence.scattered import Scattered
from benchmarks.evidence.shapes import Shapes
from benchmarks.evidence.variants import VARIANTS
from timm_depla.detection import create_detector
from timm_depla.detection.fpn import FeaturePyramidNetworkDepla
from timm_depla.loading import load_model


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of few images with its own records, an empty cache, and a small Fashion-MNIST in the package's files."""
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
    for name, instrument in INSTRUMENTS.items():
        if instrument.images is not None:
            few = replace(instrument.images, images={'train': 80, 'validation': 20})
            monkeypatch.setitem(INSTRUMENTS, name, instrument._replace(images=few))
    monkeypatch.setitem(INSTRUMENTS, 'same', INSTRUMENTS['same']._replace(seeds=range(10)))
    monkeypatch.setattr(study, 'RECORDS', tmp_path / 'records.jsonl')
    return tmp_path


def test_half_a_download_is_never_taken_for_a_whole_one(small, monkeypatch):
    half = small / 'cache/timm_depla/fashion/FashionMNIST/raw/train-images-idx3-ubyte'
    half.parent.mkdir(parents=True)
    half.touch()
    with monkeypatch.context() as bare:
        bare.setenv('XDG_DATA_DIRS', str(small / 'none'))
        bare.setattr(fashion.FashionMNIST, 'mirrors', ['https://localhost/'])
        for _ in range(2):
            with pytest.raises(RuntimeError, match='no Fashion-MNIST: apt install dataset-fashion-mnist'):
                fashion.fashion_folder()
    assert sum(map(len, fashion.by_class(False))) == 20


def test_images_are_drawn_from_their_number(small):
    scattered = Scattered(fashion.by_class, 64, (10, 48), 4, {'train': 80, 'validation': 20})
    for name, kind in (('a', scattered), ('b', scattered), ('c', replace(scattered, fragments=0))):
        drawn.write(small / name, kind)
    files = {name: sorted((small / name).rglob('*.png')) for name in 'abc'}
    assert len(files['a']) == 100 and len({path.parent for path in files['a']}) == 20
    same = [a.read_bytes() == b.read_bytes() for a, b in zip(files['a'], files['b'], strict=True)]
    assert all(same) and len({path.read_bytes() for path in files['a']}) == 100
    ink = {name: np.mean([np.asarray(Image.open(path)) for path in files[name]]) for name in 'ac'}
    assert ink['a'] > 1.1 * ink['c']
    lit = replace(scattered, is_lit=True)
    assert np.std([lit.draw(np.random.default_rng(i), True, i % 10).mean() for i in range(40)]) > 40


def test_shapes():
    """A shape that only moved has the same height and width."""
    near = [0, 0]
    for seed in range(20):
        for label in (0, 1):
            ink = Shapes({}).draw(np.random.default_rng(seed), True, label) > 0
            labels, count = ndimage.label(ink, np.ones((3, 3)))
            assert count == 2
            sides = [[part.stop - part.start for part in each] for each in ndimage.find_objects(labels)]
            near[label] += np.abs(np.subtract(*sides)).max() <= 1
    assert near[1] == 20 and near[0] < 10


@pytest.mark.parametrize('data,name', [(data, name) for data in INSTRUMENTS for name in INSTRUMENTS[data].variants])
def test_variants_exist(data, name):
    variant, instrument = VARIANTS[name], INSTRUMENTS[data]
    assert not variant.rate_of or not VARIANTS[variant.rate_of].rate_of
    if variant.is_detector:
        model = create_detector(variant.model, num_classes=11, **variant.kwargs)
        assert model.roi_heads.box_predictor.cls_score.out_features == 11
        assert ('fpn-depla' in name) == isinstance(model.backbone.fpn, FeaturePyramidNetworkDepla)
        return
    kwargs = instrument.model_kwargs(variant)
    model = timm.create_model(variant.model, device='meta', num_classes=10, in_chans=1, **kwargs)
    assert model.num_classes == 10
    if 'lite0' not in data:
        assert len(model.layer2 if data == 'fashion' else model.layer3) == 4


def test_control_has_as_many_parameters():
    sizes = [
        sum(value.numel() for value in timm.create_model(variant.model, device='meta', **variant.kwargs).parameters())
        for variant in (VARIANTS['depla'], VARIANTS['control'], VARIANTS['base'])
    ]
    assert sizes[0] - sizes[2] == pytest.approx(sizes[1] - sizes[2], rel=0.01)


@pytest.mark.parametrize('data,variant', [('same', 'control'), ('same', 'depla'), ('fashion', 'nl')])
def test_a_run_gives_its_number_again(data, variant, small):
    job = study.Job(data, variant, 3, 0.003)
    figure = small / 'maps.png' if variant == 'depla' else None
    first, again = study.train(job), study.train(job, figure=figure)
    assert first['results'].items() <= again['results'].items() and again['results'] == study.load(job)['results']
    if figure:
        study.fit(job, str(small))
        trained = load_file(small / 'run' / 'best' / 'model.safetensors')
        torch.testing.assert_close(load_model(str(small / 'run')).state_dict(), trained)  # those of the maps, too
        assert figure.is_file()
        assert np.shape(again['results']['maps']['layer3.3.depla']) == (2, 16)
    assert first['command'] == f'python -m benchmarks.evidence train {data} {variant} --lr RATE --seed SEED'
    assert study.train(job._replace(seed=4))['results'] != first['results']
    known, lines = study._index(), study.RECORDS.read_text().count('\n')
    study.compact()
    assert study._index() == known and (lines, study.RECORDS.read_text().count('\n')) == (3, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_a_run_without_its_gpu_says_so(small):
    with pytest.raises(SystemExit, match=r"--device cuda failed:\nbenchmarks.evidence: error: cannot use .*'cuda'"):
        study.run('scenes', ['fpn'], 1, 'cuda')
    assert not study.RECORDS.exists()


def fake(data, variant, seed, rate, score, **more):
    """Put a run on record."""
    key, scale = ('eval_AP', 0.01) if VARIANTS[variant].is_detector else ('eval_top1', 1)
    study.save(dict(data=data, variant=variant, seed=seed, lr=rate, results={key: [0.0, scale * score], **more}))


def tune(data, variant, rate, score):
    for job in study.tuning_jobs(data, variant, rate):
        fake(*job, score)


def test_grid_goes_on_beyond_a_best_rate_at_its_edge(small):
    assert study.tuning('same', 'base') == {0.003: None, 0.009: None, 0.027: None}
    assert list(study.tuning('scenes', 'fpn')) == [0.009, 0.027, 0.081]
    for rate, top1 in ((0.003, 88.0), (0.009, 90.0), (0.027, 89.0)):
        tune('same', 'base', rate, top1)
        tune('same', 'se', rate, -top1 if rate == 0.009 else rate)
    assert study.best_rate('same', 'base') == 0.009 and study.best_rate('fashion', 'base') is None
    assert study.best_rate('same', 'se') is None and study.tuning('same', 'se')[0.081] is None
    tune('same', 'se', 0.081, 0.0)
    assert study.best_rate('same', 'se') == 0.027  # and if it were not:
    tune('same', 'se', 0.081, 1.0)
    assert study.best_rate('same', 'se') is None and study.tuning('same', 'se')[0.243] is None
    tune('same', 'se', 0.081, 0.0)
    assert study.final_jobs('same', 'se')[-1] == study.Job('same', 'se', 9, 0.027)


def test_tables(small, monkeypatch):
    for variant, gain in (('base', 0.0), ('depla', 3.0), ('se', -3.0), ('gc', 0.01)):
        for rate in study.RATES:
            tune('same', variant, rate, 90 + rate)
        for seed in range(10):
            fake('same', variant, seed, study.RATES[-1], 85 + gain + seed % 5)
    fake('same', 'depla', 0, study.RATES[-1], 88, maps={'block': [[1.0, 2.0], [0.5, 0.5]]})
    for rate, score in zip(study.RATES[2:6], (50, 60, 65, 55), strict=True):
        tune('scenes', 'fpn-depla-0.5', rate, score)
        tune('scenes', 'fpn', rate, score)
    for seed in range(5):
        fake('scenes', 'fpn-depla-1.0', seed, 0.081, 70 + seed)
        fake('scenes', 'fpn', seed, 0.081, 60 + seed)
    assert study.best_rate('same', 'base') == study.RATES[-1] and study.best_rate('same', 'nl') is None
    # ten seeds each, of a standard deviation of 1.491: an error of 1.491 sqrt(2 / 10) = 0.667, times 2.101
    found = report.difference('same', 'depla', 'base')
    assert (found.mean, found.half) == pytest.approx((3.0, 1.401), abs=1e-3)
    claims = [(name, 'base') for name in ('depla', 'se', 'gc', 'nl')]
    for name, title, count in (('claims', 'Partly run', 4), ('parts', 'Whole', 3), ('far', 'Far', 1)):
        monkeypatch.setitem(report.TABLES, name, report.Table('same', title, claims[:count]))
    assert report.compare('claims').splitlines()[2:] == [
        '| DEPLA over base | +3.00 ± 1.40 | 0.0011 | **gains** |',
        '| SE over base | -3.00 ± 1.40 | 0.0011 | **costs** |',
        '| GC over base | +0.01 ± 1.40 | 1.0000 | **undecided** |',
        '| non-local over base | not run yet |  |  |',
    ]
    assert '| same | DEPLA | 0 | `block` | 1.50 (1.00 to 2.00) | 0.50 (0.50 to 0.50) |' in report.maps()
    assert report.compare('detection').splitlines()[3:5] == [
        '| FPN-DEPLA, T = 0.5 over FPN | not run yet |  |  | +1.1 |',
        '| FPN-DEPLA, T = 1.0 over FPN | +10.00 ± 2.31 | < 0.001 | **gains** | +1.0 |',
    ]
    for name, marks in zip(report.PAGES, (('networks', 'claims', 'parts'), ('far',), ()), strict=True):
        (small / name).write_text(''.join(f'<!-- {mark} -->\n\n<!-- end -->\n' for mark in marks))
    monkeypatch.setattr(report, 'DOCS', small)
    report.write()
    once = (small / 'evidence.md').read_text()
    report.write()
    assert (small / 'evidence.md').read_text() == once and once.count('<!-- end -->') == 3
    assert '0.729: 90.73, 2.187: 92.19 | 2.187 | 87.00 ± 1.07 | 85.00 86.00 ' in once
    assert '| scenes | FPN |  | 0.009: 50.00, 0.027: 60.00, 0.081: 65.00, 0.243: 55.00 | 0.081 |' in once
    plot = (small / 'evidence.svg').read_text()
    assert [title in plot for title in ('Whole', 'Partly run', 'Far')] == [True, False, False]


def test_holm():
    """Of p values 0.01, 0.04, 0.03 and 0.005: times 4 the least, then 3, 2 and 1, none below the one before."""
    found = [report.Difference(1.0, 1.0, p) for p in (0.01, 0.04, 0.03, 0.005)]
    assert report.correct(found, 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.correct(found[:1], 4) == pytest.approx([0.04])  # three claims are still to be run
    assert [report.verdict(found[0], p) for p in (0.0499, 0.05)] == ['gains', 'undecided']


def test_docs_are_what_the_records_say():
    made, texts = report.tables(), [(report.DOCS / name).read_text() for name in report.PAGES]
    for mark, content in made.items():
        assert sum(f'<!-- {mark} -->\n{content}\n<!-- end -->' in text for text in texts) == 1, mark
