"""Errors that a command shows as one message, without a traceback."""

__all__ = ['ConfigError', 'TrainingError', 'UserError']


class UserError(Exception):
    """Something that its reader can mend: the message says what is wrong and the way out."""


class ConfigError(UserError, ValueError):
    """A mistake in what was asked for."""


class TrainingError(UserError, RuntimeError):
    """Training, or writing what it made, cannot go on."""
