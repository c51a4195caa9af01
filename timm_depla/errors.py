"""Errors that a command shows as one message, without a traceback."""

import difflib
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Iterator, Sequence, Type


class UserError(Exception):
    """An error that the user can fix: the message says what is wrong and how to fix it."""


class ConfigError(UserError, ValueError):
    """An argument, or a file that it names, is invalid."""


class TrainingError(UserError, RuntimeError):
    """Training, or writing its output, cannot continue."""


class DivergedError(TrainingError):
    """The loss is not finite."""


@contextmanager
def as_config_error(prefix: str = '', *kinds: Type[Exception]) -> Iterator[None]:
    """Context manager that raises errors of some kinds, by default ValueError, as ConfigErrors: prefix and message.

    A ConfigError passes as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError) or not isinstance(error, kinds or ValueError):
            raise
        raise ConfigError(f'{prefix}{error}') from error


def require(module: str, extra: str) -> None:
    """Raise a ConfigError that says which extra of this package to install, if a module is missing."""
    if find_spec(module) is None:
        raise ConfigError(f'this needs {module}: pip install "timm-depla[{extra}]"')


def closest(name: str, names: Sequence[str]) -> str:
    """Return '; did you mean X?' for the valid name closest to a mistaken one, or an empty string."""
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ''


def command_for(script: str) -> str:
    """A script of the repository as a command: a verb of `timm-depla` where this process is one."""
    is_verb = sys.argv[0].startswith('timm-depla ')
    return f'timm-depla {script.removesuffix(".py").replace("_", "-")}' if is_verb else f'python {script}'
