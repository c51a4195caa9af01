"""DEPLA inserted into each of timm's networks by `insert_depla`, where it goes by default.

Each architecture of timm is created on the meta device, gets DEPLA, and sees an image of its own size: that tests
shapes, not values. There is no default place where blocks work on tokens, where no block at 1/16 takes and gives one
map of one shape, or where timm names no such stage; `modules` may name blocks elsewhere. A family is a file of timm.
"""

import argparse
from collections import Counter
from typing import Dict, List, Tuple

import timm
import torch

import timm_depla

TAKES = 'takes DEPLA'
FLAGS = dict(model='*')


def insert(name: str) -> Tuple[str, str]:
    """A network's family, and why DEPLA has no place in it, empty if it has.

    Raises:
        RuntimeError: If the network with DEPLA does not run, or gives another shape.
    """
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    x, reason = torch.zeros(1, *model.pretrained_cfg['input_size'], device='meta'), ''
    try:
        with torch.no_grad():
            shape = model(x).shape
            timm_depla.insert_depla(model)
            if model(x).shape != shape:
                raise RuntimeError(f"'{name}' with DEPLA gives another shape than {shape}")
    except ValueError as error:
        reason = str(error).partition(':')[0].partition(f'{type(model).__name__} ')[2]
    return type(model).__module__.rpartition('.')[2], reason


def run(args: argparse.Namespace) -> Dict[str, Dict[str, int]]:
    """How many networks of each family take DEPLA, and by reason how many do not."""
    results: Dict[str, Dict[str, int]] = {TAKES: Counter()}
    for name in timm.list_models(args.model):
        if name not in timm_depla.list_models():
            family, reason = insert(name)
            print(name, family, reason, flush=True)
            results.setdefault(reason or TAKES, Counter())[family] += 1
    return results


def _taken(results: Dict[str, Dict[str, int]]) -> str:
    return f'{sum(results[TAKES].values()):,} of {sum(sum(counts.values()) for counts in results.values()):,}'


def render(results: Dict[str, Dict[str, int]]) -> str:
    lists: Dict[str, List[str]] = {'All': [], 'Some': [], 'None': []}
    for family, total in sorted(sum(map(Counter, results.values()), Counter()).items()):
        yes = results[TAKES].get(family, 0)
        part = 'All' if yes == total else 'Some' if yes else 'None'
        lists[part].append(f'{family} {yes} of {total}' if part == 'Some' else f'{family} {total}')
    reasons = Counter({reason: sum(counts.values()) for reason, counts in results.items() if reason != TAKES})
    others = ', '.join(f'{count} {reason}' for reason, count in reasons.most_common())
    families = '\n'.join(f'- {part} of the family: {", ".join(found)}.' for part, found in lists.items())
    return f'{_taken(results)} networks take DEPLA. What the others do: {others}.\n\n{families}'


def summary(results: Dict[str, Dict[str, int]]) -> List[Tuple[str, str, str]]:
    return [('networks that take DEPLA', _taken(results), 'all of timm')]
