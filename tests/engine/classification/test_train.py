"""train.py and validate.py as a user runs them, on the embedded digits."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run, summary
from PIL import Image
from safetensors.torch import load_file

from timm_depla.commands import run_command
from timm_depla.data import digits_folder, scenes
from timm_depla.engine.checkpoint import list_checkpoints

FAST = ['--img-size', 32, '--epochs', 1, '--workers', 1]


@pytest.fixture
def error(monkeypatch):
    """Run a script in this process and return the message that it must exit with."""

    def run_and_fail(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / script), run_name='__main__')
        assert isinstance(caught.value.code, str)
        return caught.value.code

    return run_and_fail


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A run of a few epochs on the embedded digits, as the digits recipe trains them."""
    output = tmp_path_factory.mktemp('output')
    result = run('train.py', '--epochs', 5, '--img-size', 64, '--output', output, '--experiment', 'run').stderr
    assert 'no data folder given: training on the embedded handwritten digits' in result
    return output / 'run'


def test_learns_and_validation_reproduces_the_logged_accuracy(folder):
    rows = summary(folder)
    assert [int(r['epoch']) for r in rows] == list(range(5))
    assert float(rows[-1]['train_loss']) < float(rows[0]['train_loss'])
    assert float(rows[-1]['eval_top1']) > 80
    best = max(float(r['eval_top1']) for r in rows)
    assert f'top-1 {best:.2f}' in run('validate.py', folder).stderr


@pytest.fixture
def images(tmp_path):
    """Two classes of two images for each split."""
    for folder in (tmp_path / split / name for split in ('train', 'validation') for name in ('cat', 'dog')):
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new('RGB', (32, 32), (40 * i, 80, 120)).save(folder / f'{i}.png')
    return tmp_path


def test_bad_data(error, images, tmp_path):
    model = ['--model', 'test_resnet_depla']
    assert error('train.py', tmp_path / 'nowhere') == f"train.py: error: no data folder '{tmp_path / 'nowhere'}'"
    (tmp_path / 'empty').mkdir()
    assert "no folder or tar file 'train' in" in error('train.py', tmp_path / 'empty', *model)
    (tmp_path / 'empty' / 'train').mkdir()
    assert "no classes with images in '" in error('train.py', tmp_path / 'empty', *model)
    fast = [images, *model, '--batch-size', 2, '--img-size', 32, '--output', tmp_path / 'out']
    message = error('train.py', *fast, '--train-split', 'trian')
    assert re.search(r"no folder or tar file 'trian' in '.*', which has .*'train', 'validation'", message)
    (images / 'validation').rename(images / 'unseen')  # with train/ alone, all of it would be read as validation
    assert "no folder or tar file 'validation'" in error('train.py', *fast)
    (images / 'unseen').rename(images / 'test')
    plan = run('train.py', *fast, '--dry-run').stdout
    assert "4 training images of 'train', 4 validation images of 'test', 2" in plan


def test_bad_model(error, images):
    fast = ['train.py', images, '--batch-size', 2, *FAST]
    message = error(*fast, '--model', 'resnet50_delpa')
    assert "no model 'resnet50_delpa'; did you mean 'resnet50_depla'?" in message
    for argument, hint in (
        ("depla={'temperature': -1}", 'temperature must be from 0.001 to 1000, got -1'),
        ('stem_width=high', ''),
        ('typo=1', "'typo'"),
    ):
        message = error(*fast, '--model', 'test_resnet_depla', '--model-kwargs', argument)
        assert "cannot create model 'test_resnet_depla': " in message and hint in message
    for name, hint in (
        ('resnet50_depla', 'start from those of the network without DEPLA, --initial-checkpoint resnet50'),
        ('resnet50.nope', 'there are resnet50.'),
        ('fishnet99_depla', 'leave out --pretrained'),
    ):
        message = error(*fast, '--model', name, '--pretrained')
        assert f"no weights are published for '{name}': {hint}" in message


def test_bad_option(error, images, tmp_path):
    (tmp_path / 'out' / 'run').mkdir(parents=True)
    fast = [images, '--batch-size', 2, *FAST, '--model', 'test_resnet_depla', '--output', tmp_path / 'out']
    for flag, value, message in (
        ('--aa', 'rand-x9', 'timm cannot augment as asked'),
        ('--device', 'cuda:99', "cannot use device 'cuda:99'"),
        ('--experiment', 'run', 'by --resume auto, or choose another --experiment'),
    ):
        assert message in error('train.py', *fast, flag, value)
    assert not list((tmp_path / 'out' / 'run').iterdir())


def test_bad_image_arguments(error, digits_run, images):
    model = ['--model', 'test_resnet_depla', '--batch-size', 2]
    message = error('train.py', images, *model, '--mean', 0.5, 0.5)
    assert '--mean and --std each take one value, or one for each channel' in message
    assert "argument --interpolation: invalid choice: 'cubic'" in error('train.py', images, '--interpolation', 'cubic')
    message = error('validate.py', digits_run, '--in-chans', 5)
    assert 'the model takes 5 channels, images of the mode RGB have 3: give --in-chans 3' in message


def test_results_that_could_not_be_written_are_refused_at_once(error, digits_run, tmp_path):
    message = error('validate.py', digits_run, '--results-file', tmp_path / 'nowhere' / 'table.csv')
    assert 'is no folder that can be written to' in message
    assert 'it is a folder' in error('validate.py', digits_run, '--results-file', tmp_path)


def test_digits_without_scikit_learn(error, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    for script, *argv in (
        ['train.py'], ['validate.py', f'local-dir:{ROOT}/hub/weights/test_resnet_depla.digits'], ['train_detection.py'],
    ):  # fmt: skip
        assert 'pip install "timm-depla[digits]"' in error(script, *argv)
    with pytest.raises(SystemExit, match='2'):
        monkeypatch.setattr('sys.argv', ['scenes', str(tmp_path / 'scenes')])
        scenes.main()


def test_scenes_replace_no_other_data(images, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['scenes', str(images)])
    with pytest.raises(SystemExit, match='2'):
        scenes.main()
    assert 'holds something else' in capsys.readouterr().err and len(list(images.rglob('*.png'))) > 1


def test_diverging_loss(error, images, tmp_path):
    message = error('train.py', images, '--model', 'test_resnet_depla', '--batch-size', 2, *FAST, '--lr', 1e6,
                    '--warmup-epochs', 0, '--epochs', 20, '--output', tmp_path / 'out')  # fmt: skip
    assert re.search(r'the loss is (nan|inf) at epoch \d+, step \d, learning rate [\de.+]+: lower --lr', message)
    assert re.search(r'The batch begins with (cat|dog)/[01].png, (cat|dog)/[01].png', message)
    for checkpoint in list_checkpoints(next((tmp_path / 'out').iterdir())):
        weights = load_file(checkpoint / 'model.safetensors')
        assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())


def test_bad_checkpoint(error, folder, images, tmp_path):
    (tmp_path / 'no.pth').write_bytes(b'not a checkpoint')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last').symlink_to(folder / 'last')
    data, weights = ['--data-dir', digits_folder()], folder / 'best' / 'model.safetensors'
    for argv, message in (
        ([tmp_path / 'nowhere'], 'is no run folder'),
        ([tmp_path / 'nowhere', *data], 'is no run folder, checkpoint or model'),
        ([tmp_path, *data], 'has no checkpoint'),
        ([tmp_path / 'run', *data], f'it has not been validated yet, {tmp_path}/run/last is its last one'),
        ([weights, '--model', 'resnet18_depla', *data], r'of another architecture.* missing .* unexpected'),
        ([tmp_path / 'no.pth', '--model', 'resnet18', *data], f"cannot load '{tmp_path / 'no.pth'}'"),
        ([tmp_path / 'no.pth', *data], 'name the architecture with --model'),
        ([folder, '--data-dir', images], 'has 10 classes'),
        ([folder, '--data-dir', images, '--model', 'test_resnet_depla'], 'has 10 classes'),
        ([folder, '--crop-mode', 'square'], "invalid choice: 'square'"),
    ):
        assert re.search(message, error('validate.py', *argv))


def test_last_resort(monkeypatch, capfd):
    """An error that nobody foresaw ends in a line, and its traceback in a file."""

    def main():
        raise ZeroDivisionError('of something')

    with pytest.raises(SystemExit) as caught:
        run_command('train.py', main)
    message = r'train.py: unexpected ZeroDivisionError: of something \(the traceback is in (.*)\)'
    found = re.fullmatch(message, caught.value.code)
    assert "raise ZeroDivisionError('of something')" in Path(found[1]).read_text()
    Path(found[1]).unlink()
