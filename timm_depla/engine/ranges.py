"""Types of numeric flags: values out of range are refused when they are parsed."""

import math
from argparse import ArgumentTypeError
from typing import Callable

__all__ = [
    'channels', 'count', 'epochs', 'finite', 'fraction', 'non_negative', 'port', 'positive', 'seed', 'share',
    'side', 'whole', 'workers',
]  # fmt: skip


def _number(kind: type, says: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A flag's type: a finite number for which `holds` is true; `says` describes it in the error message."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            is_right = math.isfinite(value) and holds(value)
        except (OverflowError, ValueError):  # an integer can be larger than any float
            is_right = False
        if not is_right:
            raise ArgumentTypeError(f'it must be {says}, not {text!r}')
        return value

    return parse


def _whole_or_part(text: str) -> float:
    """A number of epochs, an int where it is whole."""
    value = float(text)
    return int(value) if value.is_integer() else value


finite = _number(float, 'a number', lambda value: True)
positive = _number(float, 'above 0', lambda value: value > 0)
non_negative = _number(float, '0 or more', lambda value: value >= 0)
share = _number(float, 'from 0 to 1', lambda value: 0 <= value <= 1)
fraction = _number(float, 'from 0 to below 1', lambda value: 0 <= value < 1)
whole = _number(int, 'a whole number from 0 on', lambda value: 0 <= value < 2**31)
count = _number(int, 'a whole number from 1 on', lambda value: 1 <= value < 2**31)
epochs = _number(_whole_or_part, '0 or more', lambda value: value >= 0)
workers = _number(int, 'a number of processes from 0 to 1024', lambda value: 0 <= value <= 1024)
seed = _number(int, 'a whole number from 0 to 4294967295', lambda value: 0 <= value < 2**32)
side = _number(int, 'a number of pixels from 1 to 16384', lambda value: 1 <= value <= 16384)
port = _number(int, 'a port from 1 to 65535', lambda value: 1 <= value <= 65535)
channels = _number(int, 'a number of channels from 1 to 4096', lambda value: 1 <= value <= 4096)
