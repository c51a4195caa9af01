#!/usr/bin/env python3
"""Train an image classifier: `python train.py` on the embedded digits, `python train.py DIR` on a folder of images."""

import sys

from timm.utils import setup_default_logging

import timm_depla  # noqa: F401  (registers the models)
from timm_depla.engine.classification import train
from timm_depla.engine.config import ConfigError, create_train_parser, parse_args


def main() -> None:
    setup_default_logging()
    parser = create_train_parser()
    try:
        args = parse_args(parser)
        if not (args.data or args.data_dir or args.recipe):
            args = parse_args(parser, default_recipe='digits')
        train(args)
    except ConfigError as error:
        sys.exit(f'train.py: error: {error}')


if __name__ == '__main__':
    main()
