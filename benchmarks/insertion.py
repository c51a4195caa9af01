"""DEPLA inserted into each of timm's networks by `insert_depla`, with its default placement.

Every architecture of `timm.list_models()` is created on the meta device, DEPLA is inserted, and an image of its own
size passes through it: that tests shapes, not values, which `test_insertion.py` compares. DEPLA has no default
place where blocks work on tokens, where no block of the stage at 1/16 takes and gives one map of one shape, or where
timm tells no such stage; `modules` may name blocks elsewhere.
"""

import argparse
from collections import Counter, defaultdict
from typing import Any, Dict, List

import timm
import torch

import timm_depla

from .record import table

FEW = 5


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--models', default='*', metavar='PATTERN', help="of timm's names")


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
    names = [name for name in timm.list_models(args.models) if name not in timm_depla.list_models()]
    rows = {}
    for name in names:
        rows[name] = insert(name)
        print(name, rows[name], flush=True)
    families: Dict[str, List[Any]] = defaultdict(lambda: [0, defaultdict(list)])
    for name, row in rows.items():
        family = families[row['family']]
        family[0] += not row['reason']
        if row['reason']:
            family[1][row['reason']].append(name)
    return {  # how many take it, and by reason how many do not: their names where they are few
        family: [yes, {reason: names if yes and len(names) < FEW else len(names) for reason, names in no.items()}]
        for family, (yes, no) in families.items()
    }


def render(results: Dict[str, Any]) -> str:
    rows, whole, counts = [], [], Counter()
    for name, (yes, no) in sorted(results.items()):
        refused = {reason: len(found) if isinstance(found, list) else found for reason, found in no.items()}
        counts.update({'': yes, **refused})
        if not refused:
            whole.append(f'{name} {yes}')
            continue
        reasons = [
            f'{reason}: {count}' + (f' ({", ".join(no[reason])})' if isinstance(no[reason], list) else '')
            for reason, count in refused.items()
        ]
        rows.append([name, f'{yes} of {yes + sum(refused.values())}', '; '.join(reasons)])
    reasons = ', '.join(f'{count} {reason}' for reason, count in counts.most_common() if reason)
    return (
        f'{counts[""]:,} of {counts.total():,} networks take DEPLA. What the others do: {reasons}.\n\n'
        f'Families (files of timm) of which every network takes it: {", ".join(whole)}.\n\n'
        + table(['family', 'take DEPLA', 'what the blocks of the others do'], rows)
    )
