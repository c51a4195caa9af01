#!/usr/bin/env python3
"""Validate an image classifier: `python validate.py RUN`, or a checkpoint or model with `--data-dir DIR`."""

import sys

from timm.utils import setup_default_logging

import timm_depla  # noqa: F401  (registers the models)
from timm_depla.engine.classification import validate
from timm_depla.engine.config import ConfigError, create_validate_parser


def main() -> None:
    setup_default_logging()
    try:
        validate(create_validate_parser().parse_args())
    except ConfigError as error:
        sys.exit(f'validate.py: error: {error}')


if __name__ == '__main__':
    main()
