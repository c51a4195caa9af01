"""Interrupted training ends bit for bit like uninterrupted training."""

import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import ROOT, fit, go_back, read_until, summary
from helpers import run as execute
from PIL import Image
from safetensors.torch import load_file

from benchmarks.differences import differences
from timm_depla.engine.checkpoint import list_checkpoints, newest_checkpoint, read_state
from timm_depla.engine.folder import RunFolder
from timm_depla.engine.metrics import rank
from timm_depla.errors import ConfigError, TrainingError

FAST = ['--recipe', 'digits', '--img-size', 32, '--batch-size', 8, '--epochs', 2, '--recovery-interval', 1,
        '--warmup-epochs', 1, '--lr', 0.1, '--workers', 0]  # fmt: skip
VARIANTS = {
    'mixing': ['--mixup', 0.2, '--cutmix', 0.5, '--mixup-off-epoch', 1, '--aa', 'original', '--reprob', 0.5,
               '--drop', 0.1, '--drop-path', 0.2, '--model-ema', '--model-ema-decay', 0.9, '--workers', 2],
    'adaptive': ['--opt', 'adamw', '--sched', 'plateau', '--no-sched-on-updates',
                 '--patience-epochs', 0, '--grad-accum-steps', 2, '--amp',
                 '--clip-grad', 1, '--channels-last', '--warmup-epochs', 0],
    'splits': ['--aug-splits', 2, '--jsd-loss', '--aa', 'augmix-m5', '--aug-repeats', 2, '--resplit', '--reprob', 0.9,
               '--sched', 'step', '--decay-epochs', 1, '--lr-noise', 0, 1, '--opt', 'lookahead_momentum'],
    'binary': ['--bce-loss', '--bce-target-thresh', 0.2, '--cutmix', 1, '--sched-on-updates', '--grad-checkpointing',
               '--layer-decay', 0.8, '--clip-grad', 0.1, '--clip-mode', 'agc', '--head-init-scale', 0.1,
               '--vflip', 0.5],
}  # fmt: skip


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two classes, 24 training and 10 validation images each."""
    folder = tmp_path_factory.mktemp('images')
    for split, count in (('train', 24), ('validation', 10)):
        for label in range(2):
            (folder / split / f'class{label}').mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 128, (20, 20, 3), generator=torch.Generator().manual_seed(i)) + 127 * label
                Image.fromarray(pixels.byte().numpy()).save(folder / split / f'class{label}' / f'{i:02}.png')
    return folder


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    """An uninterrupted run with every checkpoint."""
    output = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, 'prune', lambda *_: None)
        fit(images, *FAST, '--output', output, '--experiment', 'run')
    return output / 'run'


@pytest.fixture
def args(images, tmp_path):
    return [images, *FAST, '--output', tmp_path]


@pytest.fixture
def same(args):
    """The arguments to start or resume one and the same run."""
    return [*args, '--experiment', 'run', '--resume', 'auto']


@pytest.fixture
def keep_all(monkeypatch):
    """Every checkpoint stays."""
    monkeypatch.setattr(RunFolder, 'prune', lambda *_: None)


@pytest.mark.parametrize('variant', VARIANTS)
def test_resumes_exactly_from_any_step(variant, args, tmp_path, keep_all):
    args = [*args, *VARIANTS[variant]]
    assert fit(*args, '--experiment', 'whole') == 0
    names = [folder.name for folder in list_checkpoints(tmp_path / 'whole')]
    steps = len({name for name in names if name.startswith('0000-')}) + 1
    assert len(names) == 2 * steps
    for name in (names[-1], names[steps + 1], names[steps], names[1], names[0]):
        go_back(tmp_path / 'whole', tmp_path / name, name)
        assert fit(*args, '--experiment', name, '--resume', 'auto', '--workers', 1) == 0
        assert differences(tmp_path / name, tmp_path / 'whole') == []


def test_distillation_resumes_exactly(args, tmp_path, keep_all):
    fit(*args, '--epochs', 1, '--experiment', 'teacher')
    for kind in ('logit', 'feature'):
        distill = [*args, '--kd-model-name', tmp_path / 'teacher', '--kd-distill-type', kind]
        fit(*distill, '--experiment', kind)
        go_back(tmp_path / kind, tmp_path / f'{kind}-back', '0001-000002')
        fit(*distill, '--experiment', f'{kind}-back', '--resume', 'auto')
        assert differences(tmp_path / f'{kind}-back', tmp_path / kind) == []
    student, teacher = (load_file(tmp_path / kind / 'last/model.safetensors') for kind in ('feature', 'teacher'))
    assert student.keys() == teacher.keys()


def test_stop_epoch_and_resuming(args, tmp_path):
    """A run in two parts is the run in one; a finished run stays as it is; other lengths of keeping change nothing."""
    args = [*args, '--epochs', 3]
    fit(*args, '--experiment', 'whole')
    fit(*args, '--experiment', 'parts', '--stop-epoch', 1, '--save-epochs', 1)
    fit(*args, '--resume', tmp_path / 'parts', '--checkpoint-hist', 1, '--val-interval', 1)
    assert differences(tmp_path / 'parts', tmp_path / 'whole') == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'parts').glob('checkpoints/*/*')}
    fit(*args, '--resume', tmp_path / 'parts' / 'last')
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / 'parts').glob('checkpoints/*/*')}


def test_args_yaml_is_a_recipe(args, tmp_path):
    options = ['--model-kwargs', "depla={'bfn': 'adaptive', 'temperature': 0.5}", '--gp', 'max', '--amp']
    fit(*args, *options, '--amp-dtype', 'bfloat16', '--epochs', 1, '--experiment', 'one')
    fit('--recipe', tmp_path / 'one' / 'args.yaml', '--output', tmp_path, '--experiment', 'two')
    assert differences(tmp_path / 'one', tmp_path / 'two') == []
    a, b = (yaml.safe_load((tmp_path / name / 'args.yaml').read_text()) for name in ('one', 'two'))
    assert {key for key in a if a[key] != b[key]} == {'experiment', 'recipe'}
    model = timm.create_model(f'local-dir:{tmp_path / "two" / "best"}', pretrained=True)
    assert (model.layer3[1].depla.rpn.temperature, model.global_pool.pool_type) == (0.5, 'max')
    assert hasattr(model.layer3[1].depla.bfn, 'query')


def test_resume_refuses_another_training(same, tmp_path, caplog):
    fit(*same, '--stop-epoch', 1)
    with pytest.raises(ConfigError, match=r'other arguments: batch size 8 -> 4; seed 42 -> 1\. Give .*--resume-with'):
        fit(*same, '--batch-size', 4, '--seed', 1)
    with pytest.raises(ConfigError, match='with other arguments: epochs 2 -> 3'):
        fit(*same, '--epochs', 3)
    with pytest.raises(ConfigError, match=r'(?s)cannot resume from .*size mismatch'):
        fit(*same, '--model', 'test_resnet_depla', '--model-kwargs', "depla={'num_groups': 8}", '--resume-with-changes')
    assert fit(*same, '--batch-size', 4, '--weight-decay', 0.1, '--resume-with-changes') == 0
    assert 'resuming with changes: batch size 8 -> 4; weight decay 0.0005 -> 0.1' in caplog.text
    state = read_state(tmp_path / 'run' / 'last')
    assert state['optimizer']['param_groups'][-1]['weight_decay'] == 0.1
    assert state['position'] == [2, 0]


def test_changed_batch_keeps_the_images_seen(whole, same, tmp_path, keep_all):
    go_back(whole, tmp_path / 'run', '0001-000003')  # 24 images into the epoch
    fit(*same, '--batch-size', 4, '--resume-with-changes')
    names = [folder.name for folder in list_checkpoints(tmp_path / 'run')]
    assert '0001-000006' in names and '0001-000005' not in names  # where it resumes, and nothing before


def test_resume_without_checkpoints(args, tmp_path):
    args = [*args, '--epochs', 1]
    with pytest.raises(ConfigError, match='--resume auto resumes a run by name: add --experiment'):
        fit(*args, '--resume', 'auto')
    with pytest.raises(ConfigError, match="nowhere' has no checkpoint to resume from"):
        fit(*args, '--resume', tmp_path / 'nowhere')
    assert fit(*args, '--experiment', 'new', '--resume', 'auto') == 0  # starts fresh
    (tmp_path / 'new' / 'last' / 'state.json').write_bytes(b'')
    with pytest.raises(ConfigError, match=r'is no whole checkpoint .state.json has 0 bytes'):
        fit(*args, '--resume', tmp_path / 'new' / 'last')


@pytest.mark.parametrize('seed', range(4))
def test_damage_is_passed_over(seed, whole, same, tmp_path, caplog):
    """The newest checkpoint is truncated or changed: the one before it is used, and said so."""
    go_back(whole, tmp_path / 'run', '0001-000002')
    file = tmp_path / 'run' / 'checkpoints' / '0001-000002' / ('state.safetensors', 'model.safetensors')[seed % 2]
    data = bytearray(file.read_bytes())
    data[len(data) * seed // 4] ^= 8
    file.write_bytes(data if seed < 2 else data[: len(data) // 2])
    fit(*same)
    assert '0001-000002 is damaged' in caplog.text
    assert differences(tmp_path / 'run', whole) == []


def test_full_disk(whole, same, tmp_path):
    """A limit on the size of files stands for a full disk: the run stops with a message, the old checkpoint stays."""
    fit(*same, '--stop-epoch', 1)
    before = {p: p.read_bytes() for p in (tmp_path / 'run' / 'checkpoints').glob('*/*')}
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (500_000, 500_000))
    process = start(*same, preexec_fn=limit)
    text = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and 'Traceback' not in text
    assert re.search(r"error: cannot write '.*checkpoints/0001-\d+': File too large; earlier checkpoints", text)
    assert before == {p: p.read_bytes() for p in (tmp_path / 'run' / 'checkpoints').glob('*/*')}
    fit(*same)
    assert differences(tmp_path / 'run', whole) == []


def start(*argv, **options):
    command = [str(c) for c in (sys.executable, ROOT / 'train.py', *argv)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals(number, args, tmp_path):
    """A signal to the whole process group, workers too: the step ends, a checkpoint is saved, the exit code tells."""
    args = [*args, '--epochs', 60, '--workers', 2, '--log-interval', 1, '--recovery-interval', 0]
    process = start(*args, '--experiment', 'run')
    lines = read_until(process.stderr, 'step 3/6')
    os.killpg(process.pid, number)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 128 + number, ''.join(lines) + rest
    assert f'{number.name}: finishing the step and saving' in rest
    saved = re.search(r'saved (\d+)-(\d+); resume with: python (.*)', rest)
    steps = 6 * int(saved[1]) + int(saved[2])
    before = ''.join(lines) + rest.split('finishing')[0]
    epoch, step = re.findall(r'epoch (\d+)  step (\d)/6', before)[-1]
    assert steps - (6 * int(epoch) + int(step)) <= 2  # the step under way; the last one of an epoch is not logged
    stop = int(saved[1]) + 1
    execute(*saved[3].split(), '--stop-epoch', stop)  # recipe, data and all else from the run
    fit(*args, '--experiment', 'whole', '--stop-epoch', stop)
    assert differences(tmp_path / 'run', tmp_path / 'whole') == []


def test_second_interrupt_exits_at_once(args):
    process = start(*args, '--epochs', 60, '--img-size', 256, '--log-interval', 1)
    read_until(process.stderr, 'step 1/6')
    process.send_signal(signal.SIGINT)
    read_until(process.stderr, 'finishing the step')
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - sent < 2 or 'saved' in process.stderr.read()


def test_dead_worker(args, tmp_path):
    process = start(*args, '--epochs', 600, '--workers', 1, '--log-interval', 1)
    read_until(process.stderr, 'epoch 1/')
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 1
    message = r'error: loading data failed: DataLoader worker .*(killed|exited).*lower --workers, and resume'
    assert re.search(message, rest), rest
    assert 'Traceback' not in rest
    assert newest_checkpoint(next(tmp_path.iterdir())) is not None


def test_unreadable_images(images, tmp_path, caplog):
    shutil.copytree(images, tmp_path / 'data')
    for i in range(24, 120):
        shutil.copy(images / 'train' / 'class0' / '00.png', tmp_path / 'data' / 'train' / 'class0' / f'{i}.png')
    bad = tmp_path / 'data' / 'train' / 'class1' / '05.png'
    bad.write_bytes(bad.read_bytes()[:200])
    args = [tmp_path / 'data', *FAST, '--epochs', 1, '--workers', 2, '--recovery-interval', 0, '--output', tmp_path]
    assert fit(*args, '--experiment', 'few') == 0
    assert 'skipped an unreadable image, 1 so far: class1/05.png: image file is truncated' in caplog.text
    for name in ('03.png', '04.png'):
        (tmp_path / 'data' / 'validation' / 'class0' / name).write_bytes(b'')
    with pytest.raises(ConfigError, match=r"2 of the 20 images of the split 'validation' cannot be read"):
        fit(*args, '--experiment', 'validation')


def test_another_training_from_an_older_checkpoint_does_not_mix_with_the_old(whole, args, tmp_path, keep_all, caplog):
    """The later checkpoints are set aside, and the folder is the new training's; without changes nothing is moved."""
    run_folder = shutil.copytree(whole, tmp_path / 'run', symlinks=True)
    old, names = run_folder / 'checkpoints' / '0001-000000', {path.name for path in list_checkpoints(whole)}
    assert fit(*args, '--resume', old) == 0
    assert {path.name for path in list_checkpoints(run_folder)} == names
    before = (run_folder / 'last' / 'model.safetensors').read_bytes()
    with pytest.raises(ConfigError, match='with other arguments: without the state of the optimizer'):
        fit(*args, '--resume', old, '--no-resume-opt')
    assert fit(*args, '--resume', old, '--weight-decay', 0.1, '--resume-with-changes') == 0
    (replaced,) = run_folder.glob('replaced-after-0001-000000-*')
    assert {path.name for path in replaced.iterdir()} == {name for name in names if name > '0001-000000'}
    assert f'the checkpoints after 0001-000000 are in {replaced} now' in caplog.text
    assert (run_folder / 'last' / 'model.safetensors').read_bytes() != before
    state = read_state(run_folder / 'last')
    assert state['position'] == [2, 0] and state['arguments']['weight_decay'] == 0.1


def test_other_data_is_another_training(images, tmp_path):
    """Renamed images come in another order: a change of the run's own folder only. Other classes are never resumed."""
    names, other = 'the names of the training images, or their order', 'to a training on other data: '
    args = [*FAST, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto', '--stop-epoch', 1, '--data-dir']
    shutil.copytree(images, tmp_path / 'data')
    fit(*args, tmp_path / 'data')
    moved = (tmp_path / 'data').rename(tmp_path / 'moved')
    fit(*args, moved)  # the same names: the same data
    (moved / 'train' / 'class0' / '00.png').rename(moved / 'train' / 'class0' / 'z.png')
    with pytest.raises(ConfigError, match=f'{other}{names}'):
        fit(*args, moved, '--resume-with-changes')
    data = moved.rename(tmp_path / 'data')
    with pytest.raises(ConfigError, match=f'with other arguments: {names}'):
        fit(*args, data)
    assert fit(*args, data, '--resume-with-changes') == 0
    for split in ('train', 'validation'):
        (data / split / 'class0').rename(data / split / 'zebra')
    for more in ([], ['--resume-with-changes']):
        with pytest.raises(ConfigError, match=f"{other}classes 'class0' -> 'class1'"):
            fit(*args, data, *more)


def test_diverged_run_goes_back_to_before(same, tmp_path, caplog):
    """By the advice that the message gives."""
    args = [*same, '--epochs', 3]
    assert fit(*args, '--stop-epoch', 1) == 0
    with pytest.raises(TrainingError, match=r'the loss is (nan|inf) at epoch 1, step \d+'):
        fit(*args, '--lr', 1e6, '--warmup-epochs', 0, '--recovery-interval', 1, '--resume-with-changes')
    assert (tmp_path / 'run' / 'diverged.json').is_file()
    assert 'DivergedError: the loss is ' in (tmp_path / 'run' / 'log.txt').read_text()
    assert fit(*args, '--resume-with-changes') == 0
    assert 'the loss was not finite in epoch 1: going back to before that epoch' in caplog.text
    assert not (tmp_path / 'run' / 'diverged.json').exists()
    rows = summary(tmp_path / 'run')
    assert len(rows) == 3 and all(math.isfinite(float(row['train_loss'])) for row in rows)


@pytest.mark.parametrize('metric,values,best', [('top1', [1, 3, 2], 1), ('loss', [2, 1, 3], 1)])
def test_metrics_that_are_not_finite_rank_last(metric, values, best):
    rows = [{f'eval_{metric}': value} for value in [math.nan, *values, math.inf, -math.inf]]
    ranked = rank([*rows, {}], metric)
    assert ranked[0] is rows[1 + best]
    assert [math.isfinite(row[f'eval_{metric}']) for row in ranked] == [True] * 3 + [False] * 3


def test_run_folder_has_one_process_at_a_time(same, tmp_path, monkeypatch):
    fit(*same, '--stop-epoch', 1)
    monkeypatch.setattr('timm_depla.engine.folder.LOCK_SECONDS', 0.1)
    lock = f'filelock.FileLock({str(tmp_path / "run" / ".lock")!r}).acquire()'
    code = f'import filelock; lock = {lock}; print(flush=True); input()'
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b'\n'
        with pytest.raises(ConfigError, match=r'is in use by process \d+ on .*: let it end'):
            fit(*same)
        holder.kill()
    assert fit(*same) == 0
