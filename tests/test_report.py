"""Reports of a run."""

import csv
import queue

import pytest
from helpers import fit, validate
from PIL import Image

from timm_depla.engine.errors import ConfigError, TrainingError
from timm_depla.engine.report import UnreadableImages

FAST = ['--recipe', 'digits', '--epochs', '2', '--img-size', '32', '--workers', '0', '--experiment', 'run']


def train(output, *argv):
    """A run's folder."""
    fit(*FAST, '--output', output, *argv)
    return output / 'run'


def test_loggers_and_curves(tmp_path, monkeypatch):
    """TensorBoard's and Weights & Biases' own writers, the latter offline."""
    pytest.importorskip('wandb')
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    folder = train(tmp_path, '--log-tensorboard', '--log-wandb', '--wandb-project', 'test', '--wandb-tags', 'a', 'b')
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    logged = events.EventAccumulator(str(folder / 'tensorboard'))
    logged.Reload()
    assert [e.value for e in logged.Scalars('eval_top1')] == pytest.approx([float(row['eval_top1']) for row in rows])
    assert list((folder / 'wandb').glob('offline-run-*/run-*.wandb'))
    image = Image.open(folder / 'curves.png')
    image.load()
    assert image.size == (1200, 350)
    assert len(image.convert('RGB').getcolors(100_000)) > 20


def test_missing_logger(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'wandb', None)
    with pytest.raises(ConfigError, match='pip install "timm-depla\\[log\\]"'):
        train(tmp_path, '--log-wandb')
    assert not (tmp_path / 'run').exists()


def test_val_interval_and_plain_lines(tmp_path, caplog):
    caplog.set_level('INFO')
    folder = train(tmp_path, '--val-interval', '2', '--log-interval', '10', '--epochs', '3')
    assert 'epoch 0  step 10/22' in (folder / 'log.txt').read_text()
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    assert [bool(row['eval_top1']) for row in rows] == [False, True, True]
    assert [bool(row['train_loss']) for row in rows] == [True] * 3
    assert all(
        float(row['seconds']) * float(row['images_per_second']) == pytest.approx(22 * 64, rel=0.01) for row in rows
    )
    lines = [record.message for record in caplog.records if 'images/s' in record.message]
    assert [line.split('  ')[1] for line in lines] == ['step 10/22', 'step 20/22'] * 3
    assert all('lr ' in line and 'loss ' in line and line.endswith(' left') for line in lines)


def test_unreadable_images_are_counted_once(caplog):
    names = queue.Queue()
    images = UnreadableImages(names, 200, 'train')
    for file in ('a', 'a', 'b'):
        names.put((file, 'cause'))
    images.collect()
    assert [record.message for record in caplog.records] == [
        'skipped an unreadable image, 1 so far: a: cause',
        'skipped an unreadable image, 2 so far: b: cause',
    ]
    names.put(('c', 'cause'))
    with pytest.raises(TrainingError, match="3 of the 200 images of the split 'train' cannot be read, more than 1%"):
        images.collect()


@pytest.mark.parametrize('decay,kept', [(0.9999, 'plain'), (0.0, 'average')])
def test_average_and_plain_weights_are_both_told(decay, kept, tmp_path, caplog):
    """The better ones are kept, and the run says which; an average that still holds the start says so."""
    caplog.set_level('INFO')
    folder = train(tmp_path, '--model-ema', '--model-ema-decay', decay)
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    values = {f'{name}eval_top1': float(rows[-1][f'eval_{name}top1']) for name in ('', 'plain_')}
    assert (max(values, key=values.get) == 'plain_eval_top1') == (kept == 'plain')
    (row,) = validate(folder / 'last')
    assert row['top1'] == pytest.approx(max(values.values()), abs=1e-4)
    assert 'top-1 without average' in caplog.text
    assert ('still holds the start: it spans about 10000' in caplog.text) == (kept == 'plain')
    assert (f'best top-1 without average {row["top1"]:.2f} at epoch 1' in caplog.text) == (kept == 'plain')


def test_summary_has_the_rate_that_was_used(tmp_path):
    """By update, the schedule has moved on to the next epoch's rate when the row is written."""
    schedule = ['--sched', 'step', '--decay-epochs', 1, '--decay-rate', 0.1, '--sched-on-updates', '--lr', 0.1]
    folder = train(tmp_path, *schedule, '--warmup-epochs', 0, '--img-size', 16)
    rates = [float(row['lr']) for row in csv.DictReader((folder / 'summary.csv').open())]
    assert rates == pytest.approx([0.1, 0.01])
