"""Folders that others wrote: links lead nowhere, files ask for nothing, values are those that a network can have."""

import json
import logging
import os
import shutil

import pytest
import timm
import torch
from helpers import change_arguments, fit, flip_bit, run, validate
from safetensors.torch import load_file, save_file

from timm_depla.commands import _escape_names
from timm_depla.data import digits_folder
from timm_depla.detection import create_detector
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import SHARED, START, parse_args
from timm_depla.engine.detection.flags import create_detection_parser
from timm_depla.errors import ConfigError, TrainingError
from timm_depla.files import SUMS, find_change, list_sums, open_to_append, write_file
from timm_depla.loading import resumed_recipe
from timm_depla.schema import Kind

VICTIM = 'alias ll="ls -l"\n'


@pytest.fixture
def shared(digits_run, tmp_path):
    """A copy of a run, as another has it, beside a file of the user."""
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / '.bashrc').write_text(VICTIM)
    shutil.copytree(digits_run, tmp_path / 'run', symlinks=True)
    return tmp_path / 'run'


def resume(folder, *argv):
    argv = ['--resume', str(folder), '--workers', '0', *map(str, argv)]
    return fit(*argv, '--recipe', resumed_recipe(parse_args(create_train_parser(), argv)) or 'digits')


@pytest.mark.parametrize(
    'name',
    ['.args.yaml.part', '.summary.csv.part', '.holder.part', '.curves.png.part', 'log.txt', '.lock', 'args.yaml',
     'best', 'last', 'tensorboard', 'wandb', 'checkpoints', 'checkpoints/0009-000000',
     'checkpoints/0001-000000/record.json'],
)  # fmt: skip
@pytest.mark.parametrize('how', ['link', 'loop', 'pipe'])
def test_link_or_pipe_in_a_run_is_refused_by_name(name, how, shared):
    """Before anything is written or removed."""
    path = shared / name
    shutil.move(path, shared.parent / 'moved') if path.exists() and not path.is_symlink() else None
    path.unlink(missing_ok=True)
    is_folder = name in ('checkpoints', 'tensorboard', 'wandb')
    if how == 'pipe':
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if how == 'loop' else shared.parent / ('home' if is_folder else 'home/.bashrc'))
    message = rf'{path.name}|has no checkpoint|symbolic links|other arguments'
    with pytest.raises((ConfigError, TrainingError, OSError), match=message):
        resume(shared)
    assert (shared.parent / 'home' / '.bashrc').read_text() == VICTIM
    assert [file.name for file in (shared.parent / 'home').iterdir()] == ['.bashrc']


@pytest.mark.parametrize('name', ['log.txt', '.lock', '.summary.csv.part', 'summary.csv'])
def test_second_name_of_a_file_is_not_written(name, shared):
    (shared / name).unlink(missing_ok=True)
    os.link(shared.parent / 'home' / '.bashrc', shared / name)
    if name in ('log.txt', '.lock'):
        with pytest.raises(ConfigError, match=rf'{name} is no file, or one that has another name too'):
            resume(shared)
    else:
        resume(shared)
    assert (shared.parent / 'home' / '.bashrc').read_text() == VICTIM


def test_run_folder_that_is_a_link(shared):
    (shared.parent / 'other').symlink_to(shared)
    (shared.parent / 'link').symlink_to(shared / 'checkpoints' / '0001-000000')
    for name, message in (('other', "other' is a link: name '.*run' itself"), ('link', 'is a link to another run')):
        with pytest.raises(ConfigError, match=message):
            resume(shared.parent / name)


def test_files_are_made_anew(tmp_path):
    (tmp_path / 'victim').write_text(VICTIM)
    (tmp_path / '.new.part').symlink_to('victim')
    write_file(tmp_path / 'new', b'1')
    (tmp_path / 'log').symlink_to('victim')
    with pytest.raises(OSError):
        open_to_append(tmp_path / 'log')
    assert ((tmp_path / 'new').read_text(), (tmp_path / 'victim').read_text()) == ('1', VICTIM)


ASKED = {
    'dataset': 'hfds/evil/data', 'dataset_download': True, 'data_dir': 'https://evil.example/x.tar',
    'model': 'hf-hub:evil/x', 'kd_model_name': 'resnet18', 'log_wandb': True, 'log_tensorboard': True,
    'wandb_project': 'evil',
}  # fmt: skip


@pytest.mark.parametrize('key', ASKED)
def test_file_of_a_run_asks_for_nothing(key, shared):
    """What fetches, sends or loads must stand on the command line; the message has the words for it."""
    path, flag = str(change_arguments(shared, **{key: ASKED[key]})), f'--{key.replace("_", "-")}'
    with pytest.raises(ConfigError, match=rf"args.yaml' asks for {flag}( .*)?, which the file"):
        parse_args(create_train_parser(), ['--recipe', path])
    words = [flag] if ASKED[key] is True else [flag, ASKED[key]]
    assert getattr(parse_args(create_train_parser(), ['--recipe', path, *words]), key) == ASKED[key]


def test_start_and_place_are_the_command_line_s(shared):
    """Resuming needs no initial weights; a file says neither where a run is written nor how it starts."""
    start = dict(resume='auto', resume_with_changes=True, no_resume_opt=True, dry_run=True, pretrained=True)
    path = str(change_arguments(shared, output='/etc', experiment='../x', **start))
    args = vars(parse_args(create_train_parser(), ['--resume', str(shared)], path))
    assert {key: args[key] for key in start} == {**dict.fromkeys(start, False), 'resume': str(shared)}
    assert (args['output'], args['experiment'], args['recipe'], args['epochs']) == ('output', '', 'digits', 3)
    with pytest.raises(ConfigError, match='asks for --pretrained, which'):
        parse_args(create_train_parser(), ['--recipe', path])


def test_every_flag_is_shared_or_not():
    """A new flag is one that a file may not set, until it is a number, a choice or in the list."""
    actions = {a.dest: a for create in (create_train_parser, create_detection_parser) for a in create()._actions}
    assert set(actions) >= SHARED
    free = {dest for dest, action in actions.items() if isinstance(action.type, Kind) or action.choices is not None}
    assert not SHARED & (free | {*ASKED, *START} - {'dataset', 'data_dir', 'model'})
    assert {'log_wandb', 'output', 'kd_model_name', 'initial_checkpoint', 'resume'} <= set(actions) - SHARED - free


@pytest.mark.parametrize(
    'key,value', [('in_chans', 10**9), ('class_map', 5), ('val_split', ['x']), ('input_img_mode', 'x'), ('std', [0])]
)
def test_arguments_of_a_run_have_kinds(key, value, shared):
    change_arguments(shared, **{key: value})
    with pytest.raises(ConfigError, match=rf"args.yaml': '{key}' must be .*, not "):
        validate(shared)


@pytest.mark.parametrize('key,value', [('position', ''), ('history', 3), ('history', [{'epoch': 'x'}]), ('ranks', [])])
def test_forged_state_is_one_error(key, value, shared):
    checkpoint = (shared / 'last').resolve()
    state = json.loads((checkpoint / 'state.json').read_text())
    (checkpoint / 'state.json').write_text(json.dumps({**state, key: value}))
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != SUMS}
    (checkpoint / SUMS).write_bytes(list_sums(files))
    with pytest.raises(ConfigError, match='cannot resume from'):
        resume(shared)


@pytest.fixture
def published(digits_run, tmp_path):
    """A folder of weights, and a function that changes its config.json and the sum of that."""
    folder = tmp_path / 'published'
    folder.mkdir()
    names = ('config.json', 'model.safetensors')
    for name in names:
        shutil.copy(digits_run / 'best' / name, folder)

    def change(**values):
        config = json.loads((folder / 'config.json').read_text())
        config.update({key: value for key, value in values.items() if key in config})
        config['pretrained_cfg'].update({key: value for key, value in values.items() if key not in config})
        (folder / 'config.json').write_text(json.dumps(config))
        (folder / SUMS).write_bytes(list_sums({name: (folder / name).read_bytes() for name in names}))
        return folder

    return change


@pytest.mark.parametrize(
    'values,message',
    [
        (dict(crop_pct=0), "'crop_pct' must be from 0.1 to 2, not 0"),
        (dict(crop_mode='evil'), "'crop_mode' must be one of center, squash, border, not 'evil'"),
        (dict(mean=[float('nan')] * 3), "'mean' must be a list of numbers"),
        (dict(std=[0, 1, 1]), "'std' must be a list of numbers from 0.0001 to 1e6"),
        (dict(input_size=[3, 2**20, 32]), "'input_size' must be a list of channels, height and width"),
        (dict(interpolation=3), "'interpolation' must be one of"),
        (dict(label_names=['one']), 'label_names has 1 names for 10 classes'),
        (dict(num_classes=-1), "'num_classes' must be a number of classes"),
        (dict(model_args={'checkpoint_path': '/x'}), 'would load weights from elsewhere'),
        (dict(model_args={'device': 'meta'}), "'device' is the caller's to choose"),
        (dict(model_args={'layers': [2**40]}), "'layers' must be a moderate number, a text or a list"),
    ],
)
def test_config_json_has_values_that_a_network_has(values, message, published):
    folder = published(**values)
    with pytest.raises(ConfigError, match=rf"published' cannot be used: config.json.*: .*{message}"):
        validate(folder, '--data-dir', digits_folder())
    with pytest.raises(ValueError, match=message):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


def test_changed_weights_are_named_to_a_caller_of_timm(published):
    folder = published()
    timm.create_model(f'local-dir:{folder}', pretrained=True)
    flip_bit(folder / 'model.safetensors')
    with pytest.raises(ValueError, match=r"published' is damaged: model.safetensors was changed"):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


def test_weights_that_are_not_finite(published, tmp_path):
    folder = published()
    weights = load_file(folder / 'model.safetensors')
    weights['fc.weight'][0, 0] = float('nan')
    save_file(weights, folder / 'model.safetensors')
    published()
    with pytest.raises(ConfigError, match='the loss is nan: its weights, or mean and std, do not fit the data'):
        validate(folder, '--data-dir', digits_folder())
    with pytest.raises(ConfigError, match=r'the weights to start from are not finite: fc.weight; start from others'):
        fit('--recipe', 'digits', '--initial-checkpoint', folder, '--output', tmp_path)


@pytest.mark.parametrize(
    'listed,message',
    [
        ({'../home/.bashrc': 1}, r"checksums.json lists '../home/.bashrc', which is no name of a file in the folder"),
        ({'/dev/zero': 1}, "lists '/dev/zero', which is no name"),
        ({'pipe': 0}, 'OSError: pipe is no file'),
        ({'sparse': 2**40}, 'OSError: sparse is a sparse file'),
        ({'whole': 2**40}, 'whole has 4 bytes, not 1099511627776'),
    ],
)
def test_checksums_read_files_of_the_folder_alone(listed, message, tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'whole').write_text('text')
    with (tmp_path / 'sparse').open('wb') as file:
        file.truncate(2**40)
    entries = {name: {'bytes': size, 'sha256': '0'} for name, size in listed.items()}
    (tmp_path / SUMS).write_text(json.dumps(entries))
    assert message in find_change(tmp_path) or pytest.fail(find_change(tmp_path))


@pytest.mark.parametrize(
    'kwargs',
    [dict(min_size=0), dict(image_std=[0, 1, 1]), dict(box_score_thresh=float('nan')), dict(anchor_sizes=[1]),
     dict(rpn_nms_thresh=2), dict(depla=3), dict(backbone_kwargs='x'), dict(num_classes=1), dict(out_channels=10**9)],
)  # fmt: skip
def test_detector_arguments_have_kinds(kwargs):
    with pytest.raises(ValueError, match=rf"the detector: '{next(iter(kwargs))}' must be .*, not "):
        create_detector('fasterrcnn_test_resnet_depla_fpn_depla', **kwargs)


@pytest.mark.parametrize('name', ['pretrained', 'num_classes', 'drop_block_rate', 'global_pool', 'device', 'name'])
def test_model_arguments_that_are_flags(name):
    with pytest.raises(ConfigError, match=rf"--model-kwargs: '{name}' does not belong here: give --"):
        parse_args(create_train_parser(), ['--model-kwargs', f'{name}=1'])


def test_pretrained_path_of_a_backbone(tmp_path, caplog):
    """The backbone's weights are those of the file; a missing one is named."""
    backbone = timm.create_model('test_convnext', num_classes=7)
    save_file(backbone.state_dict(), tmp_path / 'backbone.safetensors')
    argv = ['--model', 'backbone_depla', '--model-kwargs', 'backbone=test_convnext', '--img-size', 32, '--workers', 0,
            '--recipe', 'digits', '--epochs', 1, '--lr', 0, '--weight-decay', 0, '--warmup-epochs', 0,
            '--output', tmp_path, '--experiment', 'run']  # fmt: skip
    fit(*argv, '--pretrained-path', tmp_path / 'backbone.safetensors')
    weights = load_file(tmp_path / 'run' / 'last' / 'model.safetensors')
    assert torch.equal(weights['stem.0.weight'], backbone.state_dict()['stem.0.weight'])
    for model in ('backbone_depla', 'test_resnet_depla'):
        with pytest.raises(ConfigError, match=r"--pretrained-path: no file '.*nowhere'"):
            fit(*argv[2:], '--model', model, '--pretrained-path', tmp_path / 'nowhere')


def test_control_characters_are_shown(tmp_path, monkeypatch):
    """In what a command prints and logs, and in the error that ends it."""
    data = tmp_path / 'data\x1b[31m'
    for place in (data / split / label for split in ('train', 'validation') for label in 'ab'):
        place.mkdir(parents=True)
        shutil.copy(next((digits_folder() / 'train' / '1').iterdir()), place)
    (data / 'train' / 'a' / 'x\n  \x1b[31m.png').write_bytes(b'no image')
    argv = [data, '--recipe', 'digits', '--batch-size', 2, '--epochs', 1, '--warmup-epochs', 0]
    result = run('train.py', *argv, '--output', tmp_path / 'out')
    shown = result.stdout + result.stderr + ''.join(path.read_text() for path in (tmp_path / 'out').rglob('log.txt'))
    assert r'x\n  \x1b[31m.png' in shown and '\x1b[31m' not in shown
    monkeypatch.setattr(logging, '_logRecordFactory', logging.LogRecord)
    _escape_names()
    record = logging.getLogRecordFactory()('timm', 20, '', 1, 'a\x1b %s', ('b\x1b',), None)
    assert record.getMessage() == r'a\x1b b\x1b'


def test_batch_of_one_position(tmp_path):
    with pytest.raises(TrainingError, match='a norm sees one value per channel in a batch: raise --batch-size'):
        fit('--recipe', 'digits', '--img-size', 32, '--batch-size', 1, '--workers', 0, '--output', tmp_path)


def test_long_path_is_a_message():
    result = run('validate.py', 'x' * 5000, fails=True)
    assert 'File name too long' in result.stderr and 'unexpected' not in result.stderr


def test_diverged_file_of_others(shared, caplog):
    (shared / 'diverged.json').write_text('{"epoch": 1e400}')
    assert resume(shared) == 0
    (shared / 'diverged.json').mkdir()
    with pytest.raises(TrainingError, match=r'cannot write .*diverged.json'):
        resume(shared)
