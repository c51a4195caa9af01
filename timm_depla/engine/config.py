"""Command line and recipes: a recipe overrides the defaults, and the command line overrides the recipe."""

import argparse
import difflib
from pathlib import Path
from typing import Any, Dict, Iterable, List, NoReturn, Optional, Sequence

from timm.utils import ParseKwargs

from timm_depla.files import read_mapping

from .errors import ConfigError

__all__ = [
    'VALIDATION', 'DataFolder', 'FlagParser', 'KeyValues', 'closest', 'find_name', 'list_recipes', 'parse_args',
    'updated',
]  # fmt: skip

RECIPES = Path(__file__).parent.parent / 'recipes'


def closest(name: str, names: Sequence[str]) -> str:
    """Return '; did you mean X?' for the valid name closest to a mistaken one, or an empty string."""
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ''


VALIDATION = ('validation', 'val', 'valid', 'test')
"""Names of a validation split."""


def find_name(split: str, names: Iterable[str]) -> Optional[str]:
    """The name of a split, in any case; a validation split may have any name of `VALIDATION`. None if there is none."""
    known = {name.lower(): name for name in names}
    wanted = (split, *VALIDATION) if split.lower() in VALIDATION else (split,)
    return next((known[name.lower()] for name in wanted if name.lower() in known), None)


ONCE = ('dry_run', 'no_resume_opt', 'resume', 'resume_with_changes')  # said of one start, not of the run
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


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help, where there is one and the help does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_told = action.default in (None, '', False, argparse.SUPPRESS) or action.default in ([], {})
        return action.help if is_told or 'default' in action.help else f'{action.help} (default: %(default)s)'


class FlagParser(argparse.ArgumentParser):
    """Argument parser that raises ConfigError for mistakes, with the reason if a flag of timm is left out.

    Args:
        left_out: Reasons by flag, for flags that a user may expect.
        recipes: The folder of the recipes that it knows by name.
    """

    def __init__(self, *args: Any, left_out: Dict[str, str], recipes: Path = RECIPES, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.left_out = left_out
        self.recipes = recipes

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_args(self, args: Optional[Sequence[str]] = None, namespace: Any = None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(args, namespace)
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
        except ValueError:
            raise argparse.ArgumentError(self, f'expected KEY=VALUE, not {" ".join(values)!r}') from None


class DataFolder(argparse.Action):
    """A positional DIR that means `--data-dir DIR`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, nargs='?', metavar='DIR', default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.data_dir = values


def updated(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """A copy of the arguments with other values."""
    return argparse.Namespace(**{**vars(args), **values})


def list_recipes(folder: Path = RECIPES) -> List[str]:
    """Names of the recipes in a folder of the package."""
    return sorted(path.stem for path in folder.glob('*.yaml'))


def load_recipe(name: str, folder: Path = RECIPES, derived: Sequence[str] = ()) -> Dict[str, Any]:
    """Read a recipe, a flat mapping of flags to values, by its name in a folder of the package or its file name.

    Its key `base` names another recipe, in the package or in the same folder, whose values it overrides.

    Args:
        name: The recipe.
        folder: The folder of the recipes that have names.
        derived: The recipes that this one is the base of.

    Raises:
        ConfigError: If there is no such recipe, it is no mapping, or it is its own base.
    """
    path, known = Path(name), list_recipes(folder)
    if name in known:
        path = folder / f'{name}.yaml'
    elif not path.is_file():
        raise ConfigError(f"no recipe '{name}'{closest(name, known)}: give a YAML file or one of {', '.join(known)}")
    try:
        recipe = read_mapping(path)
    except ValueError as error:
        raise ConfigError(f"recipe '{name}' must map flags to values, like 'lr: 0.2': {error}") from error
    recipe = {str(key).replace('-', '_'): value for key, value in recipe.items()}
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
    the user's take precedence.

    Args:
        parser: The parser; without a `--recipe` option, only the command line is read.
        argv: Arguments; those of the process when None.
        default_recipe: The recipe to use when none is named.

    Raises:
        ConfigError: If the recipe does not exist, or has an unknown key or an invalid value.
    """
    name = getattr(parser.parse_args(argv), 'recipe', None) or default_recipe
    if name is not None:
        recipe = load_recipe(name, parser.recipes)
        if 'recipe' in recipe:  # the args.yaml of a run
            recipe = {key: value for key, value in recipe.items() if key not in ONCE}
        actions = {action.dest: action for action in parser._actions if action.option_strings}
        for key in recipe:
            if key not in actions:
                raise ConfigError(f"unknown key '{key}' in recipe '{name}'{closest(key, list(actions))}")
        if recipe.get('dataset_trust_remote_code'):
            raise ConfigError(f"recipe '{name}' would run a data set's code: give --dataset-trust-remote-code yourself")
        flags = [flag for key, value in recipe.items() for flag in _as_flags(actions[key], value)]
        try:
            checked = vars(parser.parse_args(flags))
        except ConfigError as error:
            raise ConfigError(f"recipe '{name}': {error}") from error
        name = recipe.get('recipe') or name  # of the run whose args.yaml this is
        parser.set_defaults(**{**{key: checked[key] for key in recipe}, 'recipe': name})
    return parser.parse_args(argv)


def _as_flags(action: argparse.Action, value: Any) -> List[str]:
    """Write one key of a recipe as the flags that a user would type."""
    flag = action.option_strings[-1]
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
