#!/usr/bin/env python3
"""Write docs/flags.md from the parsers: `python docs/flags.py`."""

import argparse
from pathlib import Path
from typing import Dict, List

from timm_depla.engine.classification.flags import (
    LEFT_OUT,
    LEFT_OUT_OF_VALIDATION,
    create_train_parser,
    create_validate_parser,
)
from timm_depla.engine.detection.flags import (
    LEFT_OUT_OF_DETECTION,
    create_detection_parser,
    create_detection_validate_parser,
)
from timm_depla.engine.flags import OWN_FLAGS

HEADER = """# Flags

Flags have the names, meanings and defaults of timm's `train.py` and `validate.py` (1.0.29.dev0), except the defaults of
the model and the number of loading processes. Any other flag of timm is an error that gives the reason listed below; a
test compares these pages with timm's parsers.
Every switch has a `--no-` form. In a recipe, write flags without dashes: `batch_size: 64`.

`validate.py` takes any number of runs, checkpoints and models as arguments; timm's `--checkpoint`, `--model` and
positional data folder also work. `train_detection.py` and `validate_detection.py` have the same flags wherever they
mean the same.
"""


def flag_rows(parser: argparse.ArgumentParser, own: bool) -> List[str]:
    rows = []
    for action in parser._actions:
        is_switch = isinstance(action, argparse.BooleanOptionalAction)
        names = action.option_strings[:1] if is_switch else action.option_strings
        if not names or '--help' in names or bool(OWN_FLAGS & set(names)) != own:
            continue
        default = '' if action.default in (None, '', False, {}, []) else f'`{action.default}`'
        if '--workers' in names:
            default = 'at most 4'
        elif '--device' in names:
            default = 'the GPU, if any'
        elif isinstance(action.default, list):
            default = f'`{" ".join(f"{value:.4g}" for value in action.default)}`' if action.default else ''
        rows.append(f'| {", ".join(f"`{name}`" for name in names)} | {action.help} | {default} |')
    return rows


def section(title: str, parser: argparse.ArgumentParser, left_out: Dict[str, str]) -> str:
    lines = [f'## {title}', '', '| flag | meaning | default |', '|---|---|---|', *flag_rows(parser, own=False), '']
    own = flag_rows(parser, own=True)
    if own:
        lines += ['Flags that timm lacks:', '', '| flag | meaning | default |', '|---|---|---|', *own, '']
    if left_out:
        lines += ['Flags of timm that are not supported:', '', '| flag | reason |', '|---|---|']
        lines += [f'| `{flag}` | {reason} |' for flag, reason in sorted(left_out.items())]
    return '\n'.join(lines) + '\n'


def render() -> str:
    return '\n'.join(
        [
            HEADER,
            section('train.py', create_train_parser(), LEFT_OUT),
            section('validate.py', create_validate_parser(), LEFT_OUT_OF_VALIDATION),
            section('train_detection.py', create_detection_parser(), LEFT_OUT_OF_DETECTION),
            section('validate_detection.py', create_detection_validate_parser(), {}),
        ]
    )


if __name__ == '__main__':
    (Path(__file__).parent / 'flags.md').write_text(render())
