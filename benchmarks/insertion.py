"""DEPLA inserted into each of timm's networks by `insert_depla`, where it goes by default.

Each architecture of `timm.list_models()` is created on the meta device, gets DEPLA, and sees an image of its own size.
That tests shapes, not values, which `tests/models/test_insertion.py` compares. There is no default place where blocks
work on tokens, where no block at 1/16 takes and gives one map of one shape, or where timm names no such stage.
`modules` may name blocks elsewhere.
"""

import argparse
from collections import Counter, defaultdict
from typing import Any, Dict, List, Tuple

import timm
import torch

import timm_depla

from .flags import add_flags

FEW = 5


def add_args(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, model='*')


def insert(name: str) -> Dict[str, str]:
    """A network's family, and why DEPLA has no place in it, empty if it has.

    Raises:
        RuntimeError: If the network with DEPLA does not run, or gives another shape.
    """
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    x = torch.zeros(1, *model.pretrained_cfg['input_size'], device='meta')
    row = dict(family=type(model).__module__.rpartition('.')[2], reason='')
    try:
        with torch.no_grad():
            shape = model(x).shape
            timm_depla.insert_depla(model)
            if model(x).shape != shape:
                raise RuntimeError(f"'{name}' with DEPLA gives another shape than {shape}")
    except ValueError as error:
        row['reason'] = str(error).partition(':')[0].partition(f'{type(model).__name__} ')[2]
    return row


def run(args: argparse.Namespace) -> Dict[str, Any]:
    families: Dict[str, List[Any]] = defaultdict(lambda: [0, defaultdict(list)])
    for name in timm.list_models(args.model):
        if name not in timm_depla.list_models():
            row = insert(name)
            print(name, row, flush=True)
            family = families[row['family']]
            family[0] += not row['reason']
            if row['reason']:
                family[1][row['reason']].append(name)
    return {  # how many take it, and by reason how many do not: their names where they are few
        family: [yes, {reason: names if yes and len(names) < FEW else len(names) for reason, names in no.items()}]
        for family, (yes, no) in families.items()
    }


def _counts(no: Dict[str, Any]) -> Dict[str, int]:
    return {reason: len(found) if isinstance(found, list) else found for reason, found in no.items()}


def _total(results: Dict[str, Any]) -> Tuple[int, Counter]:
    """How many networks take DEPLA, and how many do not by reason."""
    reasons: Counter = Counter()
    for _, no in results.values():
        reasons.update(_counts(no))
    return sum(yes for yes, _ in results.values()), reasons


def render(results: Dict[str, Any]) -> str:
    taken, reasons = _total(results)
    whole = [f'{name} {yes}' for name, (yes, no) in sorted(results.items()) if not no]
    part = [
        f'{name} {yes} of {yes + sum(_counts(no).values())}'
        for name, (yes, no) in sorted(results.items())
        if yes and no
    ]
    none = [f'{name} {sum(_counts(no).values())}' for name, (yes, no) in sorted(results.items()) if not yes]
    others = ', '.join(f'{count} {reason}' for reason, count in reasons.most_common())
    return '\n- '.join([
        f'{taken:,} of {taken + reasons.total():,} networks take DEPLA. What the others do: {others}. By family '
        '(file of timm):\n',
        f'Every network takes it: {", ".join(whole)}.',
        f'Some do: {", ".join(part)}.',
        f'None does: {", ".join(none)}.',
    ])  # fmt: skip


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    taken, reasons = _total(results)
    return [('networks that take DEPLA', f'{taken:,} of {taken + reasons.total():,}', 'all of timm')]
