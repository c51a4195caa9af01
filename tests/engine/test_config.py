"""The command line and its recipes."""

import json
import runpy
from pathlib import Path

import pytest
from helpers import ROOT

from timm_depla.engine.classification import flags
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import RECIPES, list_recipes, load_recipe, parse_args
from timm_depla.engine.detection.flags import LEFT_OUT_OF_DETECTION, create_detection_parser
from timm_depla.errors import ConfigError

SHIPPED = [(create, folder, name) for create, folder in ((create_train_parser, RECIPES),
           (create_detection_parser, RECIPES / 'detection')) for name in list_recipes(folder)]  # fmt: skip


def parse(*argv, **kwargs):
    return parse_args(create_train_parser(), [str(a) for a in argv], **kwargs)


@pytest.fixture
def recipe(tmp_path):
    def write(text, name='recipe.yaml'):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize('create,folder,name', SHIPPED, ids=[name for _, _, name in SHIPPED])
def test_shipped_recipes_set_what_they_state(create, folder, name):
    args, stated = vars(parse_args(create(), ['--recipe', name])), load_recipe(name, folder)
    assert args['recipe'] == name and len(stated) > 3
    assert {key: args[key] for key in stated} == stated


def test_command_line_overrides_recipe_overrides_defaults(recipe):
    path = recipe('lr: 0.5\nepochs: 7\nchannels-last: true\nscale: [0.5, 1.0]\nmodel_kwargs: {depla: {bfn: adaptive}}')
    args = parse('data', '-c', path, '--lr', '0.25', '--no-channels-last')
    assert (args.data_dir, args.lr, args.epochs, args.channels_last, args.momentum) == ('data', 0.25, 7, False, 0.9)
    assert (args.scale, args.model_kwargs) == ([0.5, 1.0], {'depla': {'bfn': 'adaptive'}})
    assert parse('--epochs', 1, default_recipe='digits').model == 'test_resnet_depla'


def test_old_name_of_a_flag(recipe):
    for argv in (['--trunk-lr-scale', 0.5], ['--backbone-lr-scale', 0.5], ['-c', recipe('trunk_lr_scale: 0.5')]):
        assert parse(*argv).backbone_lr_scale == 0.5


@pytest.mark.parametrize(
    'text,message',
    [
        ('learning_rate: 1', "unknown key 'learning_rate' in recipe"),
        ('epoch: 1', "unknown key 'epoch' in recipe .*; did you mean 'epochs'?"),
        ('- lr', 'must map flags to values'),
        ('lr: [', 'must map flags to values'),
        ('\0\1', 'must map flags to values'),
        ('epochs: many', "--epochs: it must be a whole number from 1 on, not 'many'"),
        ('hflip: 5', "^recipe '.*recipe.yaml': argument --hflip: it must be from 0 to 1, not '5'"),
        ('dataset_trust_remote_code: true', "would run a data set's code"),
        ('a: &a [1]\nb: *a\n', r'it has an alias, \*a: write the values out'),
        ('model_kwargs: ' + '{a: ' * 9 + '1' + '}' * 9, 'it has more than 8 levels'),
        ('x: ' + 'y' * 2**16, 'has 65,539 bytes, more than 65,536'),
        ('epochs: 0x' + 'f' * 9999, 'Exceeds the limit .* for integer string conversion'),
        ('!!python/object/apply:os.system ["touch executed"]', 'could not determine a constructor'),
        ('help: true', "unknown key 'help'"),
        ('base: recipe.yaml', r'is its own base: .*recipe.yaml -> .*recipe.yaml'),
        ('base: digitz', "no recipe '.*digitz': give a YAML file or one of .*digits"),
    ],
)
def test_bad_recipe(recipe, text, message):
    with pytest.raises(ConfigError, match=message):
        parse('--recipe', recipe(text))


def test_derived_recipe_changes_its_base(recipe):
    assert (parse('--recipe', 'better').epochs, parse('--recipe', 'standard').epochs) == (400, 100)
    recipe('base: standard\nepochs: 7\nlr: 0.5')
    args = parse('--recipe', recipe('base: recipe.yaml\nlr: 0.3', 'mine.yaml'))
    assert (args.lr, args.epochs, args.weight_decay) == (0.3, 7, 5e-5)


@pytest.mark.parametrize(
    'argv,message',
    [
        (['--epoch', 5], "unknown argument '--epoch'; did you mean '--epochs'?"),
        (['--learning-rate', 0.1], r"unknown argument '--learning-rate'; did you mean '--lr'\?"),
        (['data', 'more'], "unknown argument 'more'"),
        (['--torchscript'], "'--torchscript' of timm is not here: TorchScript is deprecated"),
        (['--start-epoch=3'], "'--start-epoch' of timm is not here: .* use --resume"),
        (['--amp-dtype', 'float8'], 'argument --amp-dtype: invalid choice'),
        (['--model-kwargs', 'x'], "argument --model-kwargs: expected KEY=VALUE, not 'x'"),
        (['--model-kwargs', 'x={{}}'], "argument --model-kwargs: expected KEY=VALUE, not 'x={{}}'"),
        (['--recipe', 'digitz'], "no recipe 'digitz'; did you mean 'digits'.: give a YAML file or one of .*digits"),
    ],
)
def test_refused_flags(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


@pytest.mark.parametrize('script,left_out', [('train', flags.LEFT_OUT), ('validate', flags.LEFT_OUT_OF_VALIDATION)])
def test_every_flag_of_timm_is_here_or_has_a_reason(script, left_out):
    of_timm = json.loads((Path(__file__).parent / 'timm_flags.json').read_text())
    known = getattr(flags, f'create_{script}_parser')()._option_string_actions
    assert set(of_timm[script]) <= known.keys() | left_out.keys()
    assert not known.keys() & left_out.keys()
    text = (ROOT / 'docs' / 'flags.md').read_text()
    assert f'({of_timm["version"]})' in text and all(f'`{flag}`' in text for flag in of_timm[script])


def test_flags_of_detection_are_those_of_training_but_for_those_with_a_reason():
    known = create_detection_parser()._option_string_actions.keys()
    assert not known & LEFT_OUT_OF_DETECTION.keys()
    assert LEFT_OUT_OF_DETECTION.keys() <= create_train_parser()._option_string_actions.keys()


def test_flags_are_documented():
    docs = ROOT / 'docs'
    assert (docs / 'flags.md').read_text() == runpy.run_path(str(docs / 'flags.py'))['render']()


@pytest.mark.parametrize(
    'argv',
    [
        '--smoothing 1.5', '--smoothing -1', '--drop-path inf', '--val-interval 0', '--log-interval 0', '--vflip 2',
        '--grad-accum-steps 0', '--workers -1', f'--seed {2**70}', '--std 0 nan', '--mean nan', '--input-size 3 -1 33',
        '--img-size 999999999', '--model-ema-decay nan', '--hflip 5', '--checkpoint-minutes nan', '--epochs 0',
        '--epochs 1.5', '--lr -1', '--warmup-epochs -1', '--cutmix-minmax 0 2', '--num-classes 0', '--in-chans x',
        f'--workers {10**40}', f'--batch-size {10**40}',
    ],
)  # fmt: skip
def test_number_out_of_range_is_named(argv):
    with pytest.raises(ConfigError, match=rf'^argument .*{argv.split()[0]}: it must be .*, not '):
        parse(*argv.split())


def test_help_tells_defaults():
    text = ' '.join(create_train_parser().format_help().split())
    assert 'learning rate for a global batch of --lr-base-size (default: 0.1)' in text
    assert 'probability of a horizontal flip (default: 0.5)' in text
    assert text.count("image size in pixels (default: the model's)") == 1 and '(default: None)' not in text


def test_recipe_of_timms_defaults():
    args = vars(parse('--recipe', 'timm'))
    assert {**vars(parse()), 'model': 'resnet50', 'recipe': 'timm'} == args
