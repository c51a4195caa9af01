"""validate.py: its arguments, and its table of results."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from helpers import change_arguments, fit, flip_bit, validate
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import precision_recall_fscore_support

from timm_depla.data import digits_folder
from timm_depla.engine.classification import validate as validation
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args, updated
from timm_depla.errors import ConfigError
from timm_depla.loading import load_weights, resumed_recipe

MODEL = 'test_resnet_depla'


@pytest.fixture(scope='module')
def expected(digits_run):
    """The row of the run."""
    return validate(digits_run)[0]


def scores(row):
    return {key: value for key, value in row.items() if key not in ('model', 'images_per_second')}


def test_targets(digits_run, expected, tmp_path):
    """A run, its links, a checkpoint, a file of weights, timm's name for a folder, and timm's own ways to say them."""
    data = ['--data-dir', digits_folder()]
    assert expected['top1'] > 15
    assert expected['top1'] + expected['top1_err'] == pytest.approx(100)
    assert (expected['img_size'], expected['crop_pct'], expected['param_count']) == (32, 1.0, 0.43)
    weights = tmp_path / 'weights.safetensors'
    shutil.copy(digits_run / 'best' / 'model.safetensors', weights)
    sizes = ['--img-size', 32, '--crop-pct', 1]
    for argv in (
        [digits_run / 'best'],
        [(digits_run / 'best').resolve()],
        [f'local-dir:{digits_run / "best"}', *data],
        [weights, '--model', MODEL, *data, *sizes],
        ['--checkpoint', weights, '-m', MODEL, *data, *sizes],
        ['--checkpoint', digits_run / 'best'],
        [digits_folder(), '--model', f'local-dir:{digits_run / "best"}'],
    ):
        (row,) = validate(*argv)
        assert scores(row) == scores(expected), argv


def test_averages_over_classes_and_folded_norms(digits_run, expected, tmp_path):
    """timm's `--metrics-avg` gives scikit-learn's numbers, and `--reparam` the same answers by fewer parameters."""
    averaged = ['--metrics-avg', 'macro', '--reparam', '--results-file', tmp_path / 'table.csv']
    (row,) = validate(digits_run, *averaged)
    assert row['param_count'] <= expected['param_count'] and row['top1'] == expected['top1']
    model = timm.create_model(f'local-dir:{digits_run / "best"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = sorted((digits_folder() / 'validation').glob('*/*.png'))
    with torch.inference_mode():
        found = model(torch.stack([transform(Image.open(file).convert('RGB')) for file in files])).argmax(1)
    labels = [int(file.parent.name) for file in files]
    averages = precision_recall_fscore_support(labels, found, average='macro', zero_division=0)[:3]
    names = ('macro_precision', 'macro_recall', 'macro_f1_score')
    assert [row[name] for name in names] == pytest.approx([100 * value for value in averages], abs=1e-3)
    assert next(csv.DictReader((tmp_path / 'table.csv').open()))['macro_recall'] == str(row['macro_recall'])


def test_timm_form_validates_the_data_that_it_names(digits_run, tmp_path):
    """`validate.py DIR --model NAME --checkpoint FILE`, where DIR is not what the run was trained on."""
    few = tmp_path / 'data' / 'validation'
    for label in range(10):
        (few / str(label)).mkdir(parents=True)
        shutil.copy(sorted((digits_folder() / 'validation' / str(label)).iterdir())[0], few / str(label))
    weights = digits_run / 'best' / 'model.safetensors'
    (row,) = validate(few.parent, '--model', MODEL, '--checkpoint', weights, '--num-classes', 10, '--img-size', 32)
    assert row['images'] == 10


def test_other_classes_of_the_same_number_are_named(digits_run, tmp_path, caplog):
    shutil.copytree(digits_folder() / 'validation', tmp_path / 'val')
    (tmp_path / 'val' / '3').rename(tmp_path / 'val' / 'three')
    validate(digits_run, '--data-dir', tmp_path, '--split', 'val')
    assert "was trained on other classes, or in another order: '3' is '4' here" in caplog.text


def test_options_run(digits_run, expected):
    rows = [validate(digits_run, '--batch-size', 50, *extra)[0] for extra in ([], ['--workers', 2])]
    assert scores(rows[0]) == scores(rows[1])
    for argv in (['--channels-last'], ['--amp', '--amp-dtype', 'bfloat16'], ['--crop-mode', 'squash']):
        assert abs(validate(digits_run, *argv)[0]['top1'] - expected['top1']) < 5
    (row,) = validate(digits_run, '--img-size', 64, '--test-pool')
    assert (row['img_size'], row['crop_pct']) == (64, 1.0)
    pooled = [validate(digits_run, '--img-size', 64, '--gp', pool)[0] for pool in ('avg', 'max')]
    assert scores(pooled[0]) != scores(pooled[1])


def test_table_of_several(digits_run, tmp_path, capsys, caplog):
    first = sorted((digits_run / 'checkpoints').iterdir())[0]
    file = tmp_path / 'table'
    with pytest.raises(ConfigError, match='name what to validate'):
        validate()
    with pytest.raises(ConfigError, match='1 of the 3 models could not be validated'):
        validate(first, tmp_path, digits_run, '--results-file', file)
    assert 'is no run folder' in caplog.text  # one that fails does not stop the others
    assert capsys.readouterr().out == file.read_text()
    table = list(csv.DictReader(file.open()))
    assert [row['model'] for row in table] == [str(digits_run), str(first)]
    assert float(table[0]['top1']) > float(table[1]['top1'])
    validate(digits_run, '--results-file', file, '--results-format', 'json')
    assert json.loads(file.read_text())[0]['model'] == str(digits_run)


def test_wildcards(monkeypatch, tmp_path):
    """Models with pretrained weights, which here are a file of ours."""
    with pytest.raises(ConfigError, match=r"no model with pretrained weights fits 'resnet\*_depla'"):
        validate('resnet*_depla', '--data-dir', digits_folder())
    save_file(timm.create_model('resnet10t', num_classes=1000).state_dict(), tmp_path / 'weights.safetensors')
    (tmp_path / 'labels').write_text('\n'.join(map(str, range(10))))
    cfg = replace(timm.get_pretrained_cfg('resnet10t'), file=str(tmp_path / 'weights.safetensors'))
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, 'resnet10t.c3_in1k', cfg)
    argv = ['--data-dir', digits_folder(), '--img-size', 32, '--valid-labels', tmp_path / 'labels']
    (row,) = validate('resnet10t*', *argv)
    assert row['model'] == 'resnet10t.c3_in1k'
    assert 0 < row['top1'] < 60


def test_real_labels(digits_run, tmp_path):
    """Labels as ImageNet's reassessment has them: a list of right classes for each image, by the number in its name."""
    data = tmp_path / 'data'
    names = sorted((digits_folder() / 'validation').glob('*/*.png'))[::9]
    for i, path in enumerate(names):
        target = data / 'validation' / path.parent.name / f'ILSVRC2012_val_{i + 1:08d}.JPEG'
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    file = tmp_path / 'real.json'
    file.write_text(json.dumps([list(range(10))] * len(names)))
    assert validate(digits_run, '--data-dir', data, '--real-labels', file)[0]['top1'] == 100
    file.write_text(json.dumps([[int(path.parent.name)] for path in names]))
    rows = [validate(digits_run, '--data-dir', data, *extra)[0] for extra in ([], ['--real-labels', file])]
    assert rows[0]['top1'] == rows[1]['top1']
    file.write_text('[[1]]')
    for flag, message in (('--real-labels', '.* does not fit the images'), ('--valid-labels', '.*invalid literal')):
        with pytest.raises(ConfigError, match=flag + message):
            validate(digits_run, '--data-dir', data, flag, file)


def test_memory_runs_out(digits_run, expected, monkeypatch, caplog):
    """--retry halves the batch; without it the message says so."""
    evaluate = validation.evaluate

    def small_memory(model, loader, *args, **kwargs):
        if loader.loader.batch_size > 40:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return evaluate(model, loader, *args, **kwargs)

    monkeypatch.setattr(validation, 'evaluate', small_memory)
    with pytest.raises(ConfigError, match='memory ran out with --batch-size 64; lower it or add --retry'):
        validate(digits_run, '-b', 64)
    (row,) = validate(digits_run, '-b', 64, '--retry')
    assert row['top1'] == expected['top1']
    assert 'memory ran out with a batch of 64, trying 48' in caplog.text


@pytest.mark.parametrize('place', ['run', 'best', 'parent'])
def test_a_shared_run_runs_no_command(digits_run, place, tmp_path):
    """An args.yaml whose data webdataset would hand to a shell."""
    planted = tmp_path / 'planted'
    shutil.copytree(digits_run, planted, symlinks=True)
    data_dir = f'pipe:touch {tmp_path}/executed #://'
    change_arguments(planted, dataset='wds/', data_dir=data_dir)
    target = {'run': planted, 'best': planted / 'best', 'parent': planted / 'deeper' / 'weights'}[place]
    if place == 'parent':
        shutil.copytree((digits_run / 'best').resolve(), target)
    with pytest.raises(ConfigError, match=r'is no folder here: name the data|is no run folder'):
        validate(target)
    with pytest.raises(ConfigError, match=r"'pipe:touch .*' is not read: a stream is a local folder or one of https:"):
        validate(target, '--dataset', 'wds/', '--data-dir', data_dir)
    with pytest.raises(ConfigError, match=r"asks for --data-dir 'pipe:touch .*which the file of a run cannot do"):
        fit('--recipe', planted / 'args.yaml', '--output', tmp_path)
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('text', ['- a list', 'key: [', 'data_dir: *missing', '\x00'])
def test_damaged_args_yaml(digits_run, text, tmp_path):
    shutil.copytree(digits_run, tmp_path / 'run', symlinks=True)
    (tmp_path / 'run' / 'args.yaml').write_text(text)
    with pytest.raises(ConfigError, match=r'cannot read .*args.yaml'):
        validate(tmp_path / 'run')


def test_changed_weights_are_named(digits_run, tmp_path):
    """When they are validated, and when training starts from them."""
    shutil.copytree(digits_run, tmp_path / 'run', symlinks=True)
    flip_bit(tmp_path / 'run' / 'best' / 'model.safetensors')
    for source in ('run', 'run/best', 'run/best/model.safetensors'):
        with pytest.raises(ConfigError, match=r'is damaged: model.safetensors was changed'):
            load_weights(timm.create_model(MODEL, num_classes=10), str(tmp_path / source))
    with pytest.raises(ConfigError, match=r"best' is damaged: model.safetensors was changed"):
        validate(tmp_path / 'run/best', '--data-dir', digits_folder())
    assert '0 of DEPLA new' in load_weights(timm.create_model(MODEL, num_classes=10), str(digits_run))


@pytest.mark.parametrize(
    'planted',
    [
        dict(dataset='hfds/evil/data'),
        dict(dataset='wds/', data_dir='https://evil.example/x.tar'),
        dict(model='hf-hub:evil/model'),
        dict(kd_model_name='hf-hub:evil/teacher'),
    ],
)
def test_a_shared_run_that_is_resumed_fetches_nothing(planted, tmp_path):
    """What its args.yaml names must be here, or the command line must name it."""
    arguments = dict(recipe='digits', data_dir=str(digits_folder()), model='test_resnet_depla')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**arguments, **planted}))
    argv = ['--resume', str(tmp_path)]
    args = parse_args(create_train_parser(), argv)
    with pytest.raises(ConfigError, match=r'is no folder here: name the data|asks for --.* which the file of a run'):
        parse_args(create_train_parser(), argv, resumed_recipe(args))
    if planted.get('dataset') == 'hfds/evil/data':  # another folder does not make it local
        with pytest.raises(ConfigError, match='which is no folder here'):
            resumed_recipe(updated(args, data_dir=str(digits_folder())))
