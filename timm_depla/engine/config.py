"""Command line and recipes: flags under timm's names, defaults from a recipe, the command line above both."""

import argparse
import difflib
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
import yaml
from timm.utils import ParseKwargs

__all__ = ['ConfigError', 'closest', 'create_train_parser', 'create_validate_parser', 'list_recipes', 'parse_args']

_RECIPES = Path(__file__).parent.parent / 'recipes'


class ConfigError(ValueError):
    """A mistake of the user's: the command line shows its message, and no traceback."""


def closest(name: str, names: Sequence[str]) -> str:
    """Return '; did you mean X?' for the valid name closest to a mistaken one, or an empty string."""
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ''


def list_recipes() -> List[str]:
    """Names of the recipes shipped with the package."""
    return sorted(path.stem for path in _RECIPES.glob('*.yaml'))


def load_recipe(name: str) -> Dict[str, Any]:
    """Read a recipe, a flat mapping of flags to values, by its name in the package or its file name.

    Raises:
        ConfigError: If there is no such recipe, or it is no mapping.
    """
    path = Path(name)
    if name in list_recipes():
        path = _RECIPES / f'{name}.yaml'
    elif not path.is_file():
        raise ConfigError(f"no recipe '{name}': give a YAML file or one of {', '.join(list_recipes())}")
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe '{name}' is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"recipe '{name}' must map flags to values, like 'lr: 0.2'")
    return {str(key).replace('-', '_'): value for key, value in recipe.items()}


def parse_args(
    parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None, default_recipe: Optional[str] = None
) -> argparse.Namespace:
    """Parse a command line whose `--recipe` sets the defaults; unknown or mistyped keys of the recipe raise.

    A recipe is turned into flags and parsed ahead of the command line, so that its values are checked like the user's
    and the user's win.

    Args:
        parser: The parser, with a `--recipe` option.
        argv: Arguments; those of the process when None.
        default_recipe: The recipe to use when none is named.

    Raises:
        ConfigError: If the recipe does not exist or has a key that the parser has not.
    """
    name = parser.parse_args(argv).recipe or default_recipe
    if name is not None:
        recipe = load_recipe(name)
        actions = {action.dest: action for action in parser._actions if action.option_strings}
        for key in recipe:
            if key not in actions:
                raise ConfigError(f"unknown key '{key}' in recipe '{name}'{closest(key, list(actions))}")
        flags = [flag for key, value in recipe.items() for flag in _as_flags(actions[key], value)]
        checked = vars(parser.parse_args(flags))
        parser.set_defaults(**{**{key: checked[key] for key in recipe}, 'recipe': name})
    return parser.parse_args(argv)


def _as_flags(action: argparse.Action, value: Any) -> List[str]:
    """Write one key of a recipe as the flags that a user would type."""
    flag = action.option_strings[-1]
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        return [next(o for o in action.option_strings if o.startswith('--no-') != bool(value))]
    if isinstance(value, dict):
        return [flag, *(f'{key}={item!r}' for key, item in value.items())]
    if isinstance(value, (list, tuple)):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def _switch(group: argparse._ArgumentGroup, flag: str, help: str) -> None:
    """Add a flag that is off by default and has a --no- form, so that the command line can override a recipe."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=help)


def _add_data_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', metavar='DIR', help='data folder')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='validation split')
    group.add_argument('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images a step')
    group.add_argument(
        '-j', '--workers', type=int, default=min(4, os.cpu_count() or 1), metavar='N', help='data loading processes'
    )
    group.add_argument('--img-size', type=int, metavar='N', help="image size in pixels (default: the model's)")
    group.add_argument('--crop-pct', type=float, metavar='X', help='centre crop for validation, share of the image')
    group.add_argument('--mean', type=float, nargs='+', metavar='X', help="pixel mean (default: the model's)")
    group.add_argument('--std', type=float, nargs='+', metavar='X', help="pixel deviation (default: the model's)")
    group.add_argument('--interpolation', default='', metavar='NAME', help="resizing (default: the model's)")


def _add_device_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('device')
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')
    _switch(group, '--channels-last', 'channels-last memory format')
    _switch(group, '--amp', 'automatic mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='its lower precision')


def _add_model_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('model')
    _switch(group, '--pretrained', 'start from the weights published for the model')
    group.add_argument(
        '--initial-checkpoint',
        default='',
        metavar='FILE',
        help='start from these weights; those of the plain timm model fill the trunk',
    )
    group.add_argument('--num-classes', type=int, metavar='N', help='default: the class folders of the training split')
    group.add_argument('--gp', metavar='POOL', help='global pooling: avg, max, avgmax or catavgmax')
    group.add_argument('--drop', type=float, default=0.0, metavar='P', help='dropout before the classifier')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth')
    _switch(group, '--grad-checkpointing', 'recompute activations in the backward pass to save memory')


def _add_optimizer_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('optimizer and schedule')
    group.add_argument('--opt', default='sgd', metavar='NAME', help='any optimizer of timm')
    group.add_argument('--opt-eps', type=float, metavar='X', help='optimizer epsilon')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='X', help='optimizer betas')
    group.add_argument('--momentum', type=float, default=0.9, metavar='X', help='optimizer momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, metavar='X', help='weight decay')
    group.add_argument('--lr', type=float, default=0.1, metavar='X', help='learning rate')
    group.add_argument('--clip-grad', type=float, metavar='X', help='clip gradients to this norm')
    group.add_argument('--epochs', type=int, default=100, metavar='N', help='epochs, warm-up included')
    group.add_argument('--sched', default='cosine', metavar='NAME', help='any schedule of timm')
    _switch(group, '--sched-on-updates', 'update the learning rate at each step instead of each epoch')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='X', help='learning rate at the start')
    group.add_argument('--min-lr', type=float, default=0.0, metavar='X', help='lowest learning rate')


def _add_augmentation_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('augmentation and regularisation')
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.0], metavar='X', help='random crop, area')
    group.add_argument('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], metavar='X', help='random crop, aspect')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P', help='horizontal flip')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='X', help='brightness, contrast, saturation')
    group.add_argument('--aa', metavar='POLICY', help='AutoAugment or RandAugment policy, as timm names them')
    group.add_argument('--reprob', type=float, default=0.0, metavar='P', help='random erasing')
    group.add_argument('--mixup', type=float, default=0.0, metavar='X', help='mixup alpha')
    group.add_argument('--cutmix', type=float, default=0.0, metavar='X', help='cutmix alpha')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='X', help='label smoothing')
    _switch(group, '--model-ema', 'validate and keep an exponential moving average of the weights')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='X', help='decay of the average')
    _switch(group, '--model-ema-warmup', 'start the average at a lower decay')


def _add_run_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('run')
    group.add_argument(
        '--recipe',
        '-c',
        '--config',
        metavar='NAME|FILE',
        help=f'flags from a YAML file, or a recipe of ours: {", ".join(list_recipes())}',
    )
    group.add_argument('--train-split', default='train', metavar='NAME', help='training split')
    group.add_argument('--output', default='output', metavar='DIR', help='folder of the runs')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder of this run (default: time and model)')
    group.add_argument('--seed', type=int, default=42, metavar='N', help='random seed')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='steps between lines of a log')


def _create_parser(description: str, default_model: str) -> argparse.ArgumentParser:
    """What train.py and validate.py share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--model', default=default_model, metavar='NAME', help='any model of timm or timm_depla')
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='KEY=VALUE',
        help="model arguments, as in depla=\"{'temperature': 0.5, 'bfn': 'adaptive'}\"",
    )
    _add_data_args(parser)
    _add_device_args(parser)
    return parser


def create_train_parser() -> argparse.ArgumentParser:
    """The command line of train.py."""
    parser = _create_parser('Train an image classifier of timm or timm_depla.', default_model='resnet50_depla')
    parser.add_argument('data', nargs='?', metavar='DIR', help='data folder (default: the embedded digits)')
    for add_args in (_add_model_args, _add_optimizer_args, _add_augmentation_args, _add_run_args):
        add_args(parser)
    return parser


def create_validate_parser() -> argparse.ArgumentParser:
    """The command line of validate.py."""
    parser = _create_parser('Validate an image classifier of timm or timm_depla.', default_model='')
    parser.add_argument(
        'checkpoint',
        metavar='RUN|CHECKPOINT|MODEL',
        help='a run folder (its best checkpoint), a checkpoint, a file of weights with --model, or a '
        'model with pretrained weights',
    )
    return parser
