#!/usr/bin/env python3
"""Write the tables of docs/flags.md from the parsers: `python docs/flags.py`."""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Sequence, Set

from timm_depla.engine.classification import flags as classification
from timm_depla.engine.detection import flags as detection
from timm_depla.engine.flags import OWN_FLAGS

PAGE = Path(__file__).with_name('flags.md')
DEFAULTS = {'--workers': 'at most 4', '--device': 'the GPU if any'}  # they depend on the machine


def default(action: argparse.Action) -> str:
    value = next((DEFAULTS[name] for name in action.option_strings if name in DEFAULTS), action.default)
    if isinstance(value, list):
        return ' '.join(f'{item:.4g}' for item in value)
    return '' if value in (None, '', False) or value == {} else str(value)


def names(action: argparse.Action) -> str:
    is_switch = isinstance(action, argparse.BooleanOptionalAction)
    return ' '.join(f'`{name}`' for name in action.option_strings[: 1 if is_switch else None])


def table(*rows: Sequence[str]) -> List[str]:
    head, *body = (f'| {" | ".join(row)} |' for row in rows)
    return [head, '|' + '---|' * len(rows[0]), *body, ''] if body else []


def section(title: str, parser: argparse.ArgumentParser, left_out: Dict[str, str], old: Set[tuple]) -> List[str]:
    groups, own, reasons = defaultdict(list), [], defaultdict(list)
    for group in parser._action_groups[1:]:
        for action in group._group_actions:
            if OWN_FLAGS & set(action.option_strings):
                own.append((names(action), action.help, default(action)))
            elif '--help' not in action.option_strings:  # argparse's "options" has the model
                groups[group.title.replace('options', 'model')].append(f'{names(action)} {default(action)}'.rstrip())
    for flag, reason in sorted(left_out.items()):
        reasons[reason].append(f'`{flag}`')
    kept = [(group, ', '.join(flags)) for group, flags in groups.items()]
    missing = [(' '.join(flags), reason) for reason, flags in reasons.items()]
    again = [[row[0] for row in rows if row in old] for rows in (own, missing)]
    own, missing = ([row for row in rows if row not in old] for rows in (own, missing))
    old.update(own, missing)
    kept += [('not of timm, as above', ', '.join(again[0]))] if again[0] else []
    missing += [(' '.join(again[1]), 'as above')] if again[1] else []
    return [
        f'## {title}', '',
        *table(('group', "timm's flags and their defaults"), *kept),
        *table(('flag that timm lacks', 'meaning', 'default'), *own),
        *table(('flag of timm that is not here', 'reason'), *missing),
    ]  # fmt: skip


def render() -> str:
    old = set()  # rows of the scripts before
    lines = [PAGE.read_text().partition('\n## ')[0]]
    lines += section('train.py', classification.create_train_parser(), classification.LEFT_OUT, old)
    lines += section('validate.py', classification.create_validate_parser(), classification.LEFT_OUT_OF_VALIDATION, old)
    lines += section('train_detection.py', detection.create_detection_parser(), detection.LEFT_OUT_OF_DETECTION, old)
    lines += section('validate_detection.py', detection.create_detection_validate_parser(), {}, old)
    return '\n'.join(lines)


if __name__ == '__main__':
    PAGE.write_text(render())
