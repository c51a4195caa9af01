#!/usr/bin/env python3
"""Validate image classifiers: `python validate.py RUN`, or checkpoints and models with `--data-dir DIR`."""

import timm_depla  # noqa: F401  (registers the models)
from timm_depla.engine.classification.flags import create_validate_parser
from timm_depla.engine.classification.validate import validate
from timm_depla.engine.config import parse_args
from timm_depla.engine.world import run_command


def main() -> None:
    validate(parse_args(create_validate_parser()))


if __name__ == '__main__':
    run_command('validate.py', main)
