"""Runs of timm's train.py are read: its checkpoints, as timm's own saver writes them, and its args.yaml."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import fit, run, validate
from timm.utils import CheckpointSaver

from timm_depla.data import digits_folder
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args
from timm_depla.errors import ConfigError
from timm_depla.loading import load_model
from timm_depla.timm_runs import read_timm_run

DEFAULTS = yaml.safe_load((Path(__file__).parent / 'timm_args.yaml').read_text())


@pytest.fixture(scope='module')
def timm_run(tmp_path_factory):
    """A run folder of timm: grey digits of 32 pixels, by a network with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('timm') / 'run'
    folder.mkdir()
    model = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    args = {**DEFAULTS, 'model': 'test_resnet', 'num_classes': 10, 'in_chans': 1, 'img_size': 32, 'mean': [0.3]}
    args.update(std=[0.2], data=str(digits_folder()), epochs=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saver = CheckpointSaver(model, optimizer, Namespace(**args), checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(2, metric=10.0)
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    return folder


def test_validation_finds_all_in_the_run(timm_run, tmp_path):
    (tmp_path / 'last.pth.tar').write_bytes((timm_run / 'last.pth.tar').read_bytes())  # alone, without an args.yaml
    model = load_model(str(timm_run))
    config = {key: model.pretrained_cfg[key] for key in ('input_size', 'mean', 'std')}
    assert config == {'input_size': (1, 32, 32), 'mean': (0.3,), 'std': (0.2,)}
    rows = [validate(target)[0] for target in (timm_run, timm_run / 'last.pth.tar', tmp_path / 'last.pth.tar')]
    named = ['--model', 'test_resnet', '--data-dir', digits_folder(), '--img-size', 32, '--mean', 0.3, '--std', 0.2]
    rows += validate(timm_run / 'last.pth.tar', *named, '--in-chans', 1, '--num-classes', 10)
    assert {(row['top1'], round(row['loss'], 5), row['images']) for row in rows[1:]} == {
        (rows[0]['top1'], round(rows[0]['loss'], 5), 359)
    }


def test_publication(timm_run, tmp_path):
    run('-m', 'hub.publish', timm_run, '--output', tmp_path / 'out')
    record = json.loads((tmp_path / 'out' / 'record.json').read_text())
    assert (record['architecture'], record['recipe'], record['results']['epochs']) == ('test_resnet', 'timm', 3)
    (row,) = validate(f'local-dir:{tmp_path / "out"}', '--in-chans', 1)
    assert row['top1'] == pytest.approx(record['results']['top1'])


def test_its_arguments_are_a_recipe(timm_run, tmp_path):
    args = vars(parse_args(create_train_parser(), ['--recipe', str(timm_run / 'args.yaml')]))
    assert (args['data_dir'], args['img_size'], args['mean'], args['hflip']) == (str(digits_folder()), 32, [0.3], 0.5)
    (tmp_path / 'default.yaml').write_text(yaml.safe_dump(DEFAULTS))
    default = parse_args(create_train_parser(), ['--recipe', str(tmp_path / 'default.yaml')])
    ours = parse_args(create_train_parser(), ['--recipe', 'timm'])
    assert {**vars(ours), 'recipe': '', 'workers': 4, 'device': 'cuda'} == {**vars(default), 'recipe': ''}
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**DEFAULTS, 'bn_eps': 0.001}))
    with pytest.raises(ConfigError, match=r"'bn_eps: 0.001' of timm is not here: an argument of EfficientNet's"):
        parse_args(create_train_parser(), ['--recipe', str(tmp_path / 'args.yaml')])


def test_resuming_says_what_works_instead(timm_run):
    for target in (timm_run, timm_run / 'last.pth.tar'):
        with pytest.raises(ConfigError, match=rf'start from it: --initial-checkpoint {timm_run}/\w+.pth.tar'):
            fit('--resume', target, '--recipe', timm_run / 'args.yaml', '--device', 'cpu')


def test_a_shared_checkpoint_loads_nothing_from_elsewhere(timm_run, tmp_path):
    found = torch.load(timm_run / 'last.pth.tar', weights_only=False)
    for key, value, message in (
        ('model_kwargs', {'pretrained': True}, 'would load weights from elsewhere'),
        ('model_kwargs', {'checkpoint_path': '/etc/passwd'}, 'would load weights from elsewhere'),
        ('num_classes', 10**9, "last.pth.tar': 'num_classes' must be a number of classes, at most 1000000"),
        ('mean', 'x', "'mean' must be a list of numbers, not 'x'"),
    ):
        setattr(found['args'], key, value)
        torch.save(found, tmp_path / 'last.pth.tar')
        with pytest.raises(ConfigError, match=message):
            load_model(str(tmp_path))
    found['args'] = Path  # a class, which the unpickler refuses
    torch.save(found, tmp_path / 'last.pth.tar')
    assert read_timm_run(str(tmp_path)) is None
