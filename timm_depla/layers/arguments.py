"""Check of the keys in a network's `depla` argument."""

from typing import Any, Dict

__all__ = ['check_depla_args']

DEPLA_ARGS = ('num_groups', 'pooled_chs', 'maps_per_group', 'temperature', 'bfn', 'keep_candidate')  # of `Depla`


def check_depla_args(depla: Dict[str, Any], *network_args: str) -> None:
    """Raise TypeError if `depla` has a key that is neither an argument of `Depla` nor in `network_args`."""
    allowed = [*network_args, *DEPLA_ARGS]
    if unknown := sorted(set(depla) - set(allowed)):
        raise TypeError(f'unknown depla argument {unknown}; there are {allowed}')
