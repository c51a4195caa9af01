"""Reports of a run."""

import queue

import pytest
from helpers import SMALL, fit, summary, validate
from PIL import Image

from timm_depla.engine.batches import UnreadableImages
from timm_depla.engine.curves import draw_curves
from timm_depla.errors import ConfigError, TrainingError


def train(output, *argv):
    """A run's folder."""
    fit(*SMALL, '--epochs', 2, '--output', output, '--experiment', 'run', *argv)
    return output / 'run'


def test_loggers_and_curves(tmp_path, monkeypatch):
    """TensorBoard's and Weights & Biases' own writers, the latter offline."""
    pytest.importorskip('wandb')
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    folder = train(tmp_path, '--log-tensorboard', '--log-wandb', '--wandb-project', 'test', '--wandb-tags', 'a', 'b')
    rows = summary(folder)
    logged = events.EventAccumulator(str(folder / 'tensorboard'))
    logged.Reload()
    assert [e.value for e in logged.Scalars('eval_top1')] == pytest.approx([float(row['eval_top1']) for row in rows])
    assert list((folder / 'wandb').glob('offline-run-*/run-*.wandb'))
    image = Image.open(folder / 'curves.png').convert('RGB')
    assert image.size == (1200, 350) and len(image.getcolors(100_000)) > 20


def test_missing_logger(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'wandb', None)
    with pytest.raises(ConfigError, match='pip install "timm-depla\\[log\\]"'):
        train(tmp_path, '--log-wandb')
    assert not (tmp_path / 'run').exists()


def test_val_interval_and_plain_lines(tmp_path, caplog):
    caplog.set_level('INFO')
    folder = train(tmp_path, '--val-interval', '2', '--log-interval', '10', '--epochs', '3')
    assert 'epoch 0  step 10/22' in (folder / 'log.txt').read_text()
    rows = summary(folder)
    assert [bool(row['eval_top1']) for row in rows] == [False, True, True] and all(row['train_loss'] for row in rows)
    images = [float(row['seconds']) * float(row['images_per_second']) for row in rows]
    assert images == pytest.approx([22 * 64] * 3, rel=0.01)
    lines = [record.message for record in caplog.records if 'images/s' in record.message]
    assert [line.split('  ')[1] for line in lines] == ['step 10/22', 'step 20/22'] * 3
    assert all('lr ' in line and 'loss ' in line and line.endswith(' left') for line in lines)


def test_unreadable_images_are_counted_once(caplog):
    names = queue.Queue()
    images = UnreadableImages(names, 200, 'train')
    for file in ('a', 'a', 'b'):
        names.put((file, 'cause'))
    images.collect()
    assert [message[-18:] for message in caplog.messages] == ['1 so far: a: cause', '2 so far: b: cause']
    names.put(('c', 'cause'))
    with pytest.raises(TrainingError, match="3 of the 200 images of the split 'train' cannot be read, more than 1%"):
        images.collect()


@pytest.mark.parametrize('decay,kept', [(0.9999, 'plain'), (0.0, 'average')])
def test_average_and_plain_weights_are_both_told(decay, kept, tmp_path, caplog):
    """The better ones are kept, and the run says which; an average that still holds the start says so."""
    caplog.set_level('INFO')
    folder = train(tmp_path, '--model-ema', '--model-ema-decay', decay)
    rows = summary(folder)
    values = {f'{name}eval_top1': float(rows[-1][f'eval_{name}top1']) for name in ('', 'plain_')}
    assert (max(values, key=values.get) == 'plain_eval_top1') == (kept == 'plain')
    (row,) = validate(folder / 'last')
    assert row['top1'] == pytest.approx(max(values.values()), abs=1e-4)
    lines = [line for line in caplog.messages if line.startswith('epoch ')]
    assert all(f'(plain {float(row["eval_plain_top1"]):.2f}, ' in line for row, line in zip(rows, lines, strict=True))
    assert all(len(line) <= 90 for line in lines)  # 100 with three digits in each number
    assert ('still holds the start: it spans about 10000' in caplog.text) == (kept == 'plain')
    assert (f'best top-1 without average {row["top1"]:.2f} at epoch 1' in caplog.text) == (kept == 'plain')


def test_curves_show_a_short_run_whole(monkeypatch):
    """The first epoch of a long run may be cut off, where it would flatten the rest."""
    axes = pytest.importorskip('matplotlib.axes')
    set_ylim, cuts = axes.Axes.set_ylim, []

    def record(self, *limits, **options):
        cuts.extend([] if options else [limits])  # matplotlib itself gives options
        return set_ylim(self, *limits, **options)

    monkeypatch.setattr(axes.Axes, 'set_ylim', record)
    for epochs in (3, 9):
        draw_curves([dict(epoch=i, train_loss=9.0 if i == 0 else 0.5, lr=0.1) for i in range(epochs)], [])
        assert bool(cuts) == (epochs == 9)


def test_summary_has_the_rate_that_was_used(tmp_path):
    """By update, the schedule has moved on to the next epoch's rate when the row is written."""
    schedule = ['--sched', 'step', '--decay-epochs', 1, '--decay-rate', 0.1, '--sched-on-updates', '--lr', 0.1]
    folder = train(tmp_path, *schedule, '--warmup-epochs', 0, '--img-size', 16)
    rates = [float(row['lr']) for row in summary(folder)]
    assert rates == pytest.approx([0.1, 0.01])
