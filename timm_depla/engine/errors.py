"""Errors that a command shows as one message, without a traceback."""

from importlib.util import find_spec

__all__ = ['ConfigError', 'DivergedError', 'TrainingError', 'UserError', 'require']


class UserError(Exception):
    """Something that its reader can mend: the message says what is wrong and the way out."""


class ConfigError(UserError, ValueError):
    """A mistake in what was asked for."""


class TrainingError(UserError, RuntimeError):
    """Training, or writing what it made, cannot go on."""


class DivergedError(TrainingError):
    """The loss is not finite."""


def require(module: str, extra: str) -> None:
    """Raise a ConfigError that says what to install if a module is not there.

    Args:
        module: The module's name.
        extra: The extra of this package that installs it.
    """
    if find_spec(module) is None:
        raise ConfigError(f'this needs {module}: pip install "timm-depla[{extra}]"')
