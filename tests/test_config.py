"""The command line and its recipes."""

import pytest
import yaml

from timm_depla.engine.config import ConfigError, create_train_parser, create_validate_parser, list_recipes, parse_args


def parse(*argv, **kwargs):
    return parse_args(create_train_parser(), [str(a) for a in argv], **kwargs)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / 'recipe.yaml'
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize('name', list_recipes())
def test_shipped_recipes_parse(name):
    args = parse('--recipe', name)
    assert args.recipe == name
    assert args.epochs > 0


def test_command_line_overrides_recipe_overrides_defaults(recipe):
    path = recipe('lr: 0.5\nepochs: 7\nchannels-last: true\nscale: [0.5, 1.0]\nmodel_kwargs: {depla: {bfn: adaptive}}')
    args = parse('data', '-c', path, '--lr', '0.25', '--no-channels-last')
    assert (args.data, args.lr, args.epochs, args.channels_last, args.momentum) == ('data', 0.25, 7, False, 0.9)
    assert args.scale == [0.5, 1.0]
    assert args.model_kwargs == {'depla': {'bfn': 'adaptive'}}


def test_default_recipe():
    assert parse('--epochs', 1, default_recipe='digits').model == 'test_resnet_depla'


def test_configuration_is_accepted_back(recipe):
    args = parse('--recipe', 'digits', '--lr', 0.3, '--model-kwargs', "depla={'temperature': 0.5}", '--amp')
    again = parse('--recipe', recipe(yaml.safe_dump({k: v for k, v in vars(args).items() if k != 'data'})))
    assert {**vars(again), 'recipe': 'digits'} == vars(args)


@pytest.mark.parametrize(
    'text,message',
    [
        ('learning_rate: 1', "unknown key 'learning_rate' in recipe"),
        ('epoch: 1', "unknown key 'epoch' in recipe .*; did you mean 'epochs'?"),
        ('- lr', 'must map flags to values'),
        ('lr: [', 'is not valid YAML'),
    ],
)
def test_bad_recipe(recipe, text, message):
    with pytest.raises(ConfigError, match=message):
        parse('--recipe', recipe(text))


def test_missing_recipe():
    with pytest.raises(ConfigError, match=r"no recipe 'digitz': give a YAML file or one of .*digits"):
        parse('--recipe', 'digitz')


def test_mistyped_value_names_the_flag(recipe, capsys):
    with pytest.raises(SystemExit):
        parse('--recipe', recipe('epochs: many'))
    assert "--epochs: invalid int value: 'many'" in capsys.readouterr().err


def test_validate_parser():
    args = create_validate_parser().parse_args(['run', '--data-dir', 'data', '-b', '3'])
    assert (args.checkpoint, args.data_dir, args.batch_size, args.model) == ('run', 'data', 3, '')
