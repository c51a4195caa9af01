"""Command line and recipes: a recipe overrides the defaults, and the command line overrides the recipe."""

import argparse
import shlex
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Set

from timm.utils import ParseKwargs

from timm_depla.errors import ConfigError, as_config_error, closest
from timm_depla.files import SUMS, read_mapping
from timm_depla.loading import resumed_recipe
from timm_depla.schema import Kind, check_arguments
from timm_depla.timm_runs import translate

RECIPES = Path(__file__).parent.parent / 'recipes'
ONCE = ('dry_run', 'experiment', 'no_resume_opt', 'output', 'resume', 'resume_with_changes')  # of one start
START = ('initial_checkpoint', 'pretrained', 'pretrained_backbone', 'pretrained_path')  # of a run without checkpoint
SHARED = {
    'aa', 'amp', 'bce_loss', 'bce_sum', 'channels_last', 'class_map', 'data_dir', 'dataset', 'deterministic', 'device',
    'gp', 'grad_checkpointing', 'input_key', 'jsd_loss', 'model', 'model_ema', 'model_ema_warmup', 'model_kwargs',
    'no_aug', 'no_ddp_bb', 'opt', 'opt_kwargs', 'pin_mem', 'recipe', 'resplit', 'sched', 'sched_on_updates', 'sync_bn',
    'target_key', 'torchcompile', 'torchcompile_mode', 'train_split', 'val_split', 'warmup_prefix',
}  # fmt: skip
"""Texts and switches that the file of a run may set on its own, as it may numbers and choices. The rest fetches, sends,
loads or writes: it must stand on the command line, and so must a model, data set or folder that is not local."""
SYNONYMS = {
    '--arch': '--model',
    '--learning-rate': '--lr',
    '--name': '--experiment',
    '--num-epochs': '--epochs',
    '--num-workers': '--workers',
    '--optimizer': '--opt',
    '--output-dir': '--output',
    '--scheduler': '--sched',
    '--wd': '--weight-decay',
}
"""Names that others have for flags."""
ALIASES = {'trunk_lr_scale': 'backbone_lr_scale'}  # of keys in recipes
_ALIKE = ('backbone_norm', 'device', 'in_chans', 'num_classes', 'pretrained', 'pretrained_backbone')
ARGUMENTS = {
    **{name: f'--{name.replace("_", "-")}' for name in (*_ALIKE, 'trainable_backbone_layers')},
    'checkpoint_path': '--initial-checkpoint',
    'drop_block_rate': '--drop-block',
    'drop_path_rate': '--drop-path',
    'drop_rate': '--drop',
    'global_pool': '--gp',
    'name': '--model',
    'pretrained_cfg_overlay': '--pretrained-path',
}
"""Arguments of networks that have flags."""


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help, where there is one and the help does not state it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_stated = action.default in (None, '', False, argparse.SUPPRESS) or action.default in ([], {})
        return action.help if is_stated or 'default' in action.help else f'{action.help} (default: %(default)s)'


class FlagParser(argparse.ArgumentParser):
    """Argument parser that raises ConfigError for mistakes, with the reason if a flag of timm is left out.

    A positional argument `data` means `--data-dir`. `left_out` has reasons by flag, for flags that a user may expect;
    `recipes` is the folder of the recipes that it knows by name.
    """

    def __init__(self, arguments: str, description: str, left_out: Dict[str, str], recipes: Path = RECIPES):
        usage = f'%(prog)s {arguments} [--FLAG VALUE ...]'
        super().__init__(usage=usage, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self.left_out = left_out
        self.recipes = recipes

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_args(self, args: Optional[Sequence[str]] = None, namespace: Any = None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(args, namespace)
        if folder := vars(args).pop('data', None):  # the positional DIR
            args.data_dir = folder
        if not unknown:
            return args
        flag = next((word.split('=')[0] for word in unknown if word.startswith('-')), unknown[0])
        if flag in self.left_out:
            raise ConfigError(f"'{flag}' of timm is not here: {self.left_out[flag]}")
        known = [SYNONYMS[flag]] if flag in SYNONYMS else list(self._option_string_actions)
        hint = f"; did you mean '{known[0]}'?" if flag in SYNONYMS else closest(flag, known)
        raise ConfigError(f"unknown argument '{flag}'{hint}")


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE arguments, with an error message for malformed ones."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (MemoryError, RecursionError, TypeError, ValueError):
            raise argparse.ArgumentError(self, f'expected KEY=VALUE, not {" ".join(values)!r}') from None


def updated(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """A copy of the arguments with other values."""
    return argparse.Namespace(**{**vars(args), **values})


def list_recipes(folder: Path = RECIPES) -> List[str]:
    """Names of the recipes in a folder of the package."""
    return sorted(path.stem for path in folder.glob('*.yaml'))


def load_recipe(name: str, folder: Path = RECIPES, derived: Sequence[str] = ()) -> Dict[str, Any]:
    """Read a recipe, a flat mapping of flags to values, by its name in a folder of the package or its file name.

    Its key `base` names another recipe, in the package or in the same folder, whose values it overrides; `derived` are
    those that this one is the base of. ConfigError if there is no such recipe, it is no mapping, or its own base.
    """
    path, known = Path(name), list_recipes(folder)
    if name in known:
        path = folder / f'{name}.yaml'
    elif not path.is_file():
        raise ConfigError(f"no recipe '{name}'{closest(name, known)}: give a YAML file or one of {', '.join(known)}")
    with as_config_error(f"recipe '{name}' must map flags to values, like 'lr: 0.2': "):
        recipe = read_mapping(path)
    recipe = {str(key).replace('-', '_'): value for key, value in recipe.items()}
    recipe = {ALIASES.get(key, key): value for key, value in recipe.items()}
    base = recipe.pop('base', None)
    if base is None:
        return recipe
    base = str(base) if base in known else str(path.parent / str(base))
    if base in (names := (*derived, name)):
        raise ConfigError(f"recipe '{name}' is its own base: {' -> '.join((*names, base))}")
    return {**load_recipe(base, folder, names), **recipe}


def parse_args(
    parser: FlagParser, argv: Optional[Sequence[str]] = None, default_recipe: Optional[str] = None
) -> argparse.Namespace:
    """Parse a command line whose `--recipe` sets the defaults.

    The recipe is turned into flags and parsed before the command line, so its values are checked like the user's, and
    the user's take precedence. The arguments are those of the process when `argv` is None; `default_recipe` is used
    when none is named. ConfigError if the recipe does not exist, or has an unknown key or an invalid value.
    """
    typed = parser.parse_args(argv)
    name = getattr(typed, 'recipe', None) or default_recipe
    if name is not None:
        recipe = translate(load_recipe(name, parser.recipes), parser.left_out, name)
        is_shared = Path(name).name == 'args.yaml' or 'recipe' in recipe or (Path(name).parent / SUMS).exists()
        if is_shared:
            left_out = (*ONCE, *START) if getattr(typed, 'resume', '') not in ('', 'auto') else ONCE
            recipe = {key: value for key, value in recipe.items() if key not in left_out}
        actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != 'help'}
        for key in recipe:
            if key not in actions:
                raise ConfigError(f"unknown key '{key}' in recipe '{name}'{closest(key, list(actions))}")
        if recipe.get('dataset_trust_remote_code'):
            raise ConfigError(f"recipe '{name}' would run a data set's code: give --dataset-trust-remote-code yourself")
        flags = {key: _as_flags(actions[key], value) for key, value in recipe.items()}
        try:
            checked = vars(parser.parse_args([word for words in flags.values() for word in words]))
        except ConfigError as error:
            raise ConfigError(f"recipe '{name}': {error}") from error
        if is_shared:
            given = _given(parser, actions, argv)
            asked = {key for key in recipe if checked[key] != parser.get_default(key) and key not in given}
            if refused := [key for key in recipe if key in asked and not _is_harmless(actions[key], checked)]:
                words = shlex.join(word for key in refused for word in flags[key])
                raise ConfigError(
                    f"'{name}' asks for {words}, which the file of a run cannot do on its own: add that to the command "
                    'line if you trust it, or the same flags with values of yours'
                )
        name = recipe.get('recipe') or name  # of the run whose args.yaml this is
        parser.set_defaults(**{**{key: checked[key] for key in recipe}, 'recipe': name})
    args = parser.parse_args(argv)
    reasons = {**{flag: f'give {flag}' for flag in parser._option_string_actions}, **parser.left_out}
    flags = {name: reasons[flag] for name, flag in ARGUMENTS.items() if flag in reasons}
    with as_config_error():
        check_arguments(getattr(args, 'model_kwargs', {}), '--model-kwargs', flags)
    return args


def parse_training_args(parser: FlagParser, on_data: str, on_embedded: str) -> argparse.Namespace:
    """Parse the process's command line, by default with the recipe of a resumed run, for data or for embedded data."""
    args = parse_args(parser)
    if args.recipe:
        return args
    default = on_data if args.data_dir or getattr(args, 'dataset', '') else on_embedded
    return parse_args(parser, default_recipe=resumed_recipe(args) or default)


def _given(parser: FlagParser, actions: Dict[str, argparse.Action], argv: Optional[Sequence[str]]) -> Set[str]:
    """The arguments that a command line itself sets."""
    unset = object()
    found = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(actions, unset))))
    return {key for key, value in found.items() if value is not unset}


def _is_harmless(action: argparse.Action, checked: Dict[str, Any]) -> bool:
    """Whether the file of a run may set this argument to its value; see `SHARED`."""
    value = checked[action.dest]
    if action.dest == 'model':
        return ':' not in value
    if action.dest == 'dataset':
        return value in ('', 'wds/') or value.startswith('torch/')  # which --dataset-download alone fetches
    if action.dest in ('data_dir', 'class_map'):
        return '://' not in value and not value.startswith('pipe:')
    return action.dest in SHARED or isinstance(action.type, Kind) or action.choices is not None


def _as_flags(action: argparse.Action, value: Any) -> List[str]:
    """Write one key of a recipe as the flags that a user would type."""
    flag = max(action.option_strings, key=len)
    if value is None or value == []:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[0 if value else 1]]
    if action.nargs == 0:
        return [flag] if value else []
    if isinstance(value, dict):
        return [flag, *(f'{key}={item!r}' for key, item in value.items())]
    if isinstance(value, (list, tuple)):
        return [flag, *map(str, value)]
    return [flag, str(value)]
