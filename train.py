#!/usr/bin/env python3
"""Train an image classifier: `python train.py` on the embedded digits, `python train.py DIR` on a folder of images."""

import timm_depla  # noqa: F401  (registers the models)
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.classification.train import train
from timm_depla.engine.config import parse_args
from timm_depla.engine.models import resumed_recipe
from timm_depla.engine.world import run_command


def main() -> int:
    parser = create_train_parser()
    args = parse_args(parser)
    if not args.recipe:
        default = 'better' if args.data_dir or args.dataset else 'digits'
        args = parse_args(parser, default_recipe=resumed_recipe(args) or default)
    return train(args)


if __name__ == '__main__':
    run_command('train.py', main)
