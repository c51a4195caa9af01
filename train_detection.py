#!/usr/bin/env python3
"""Train a detector: `python train_detection.py` on digits in scenes, `python train_detection.py DIR` on COCO data."""

import timm_depla  # noqa: F401  (registers the models)
from timm_depla.engine.config import parse_args
from timm_depla.engine.errors import require
from timm_depla.engine.world import run_command


def main() -> int:
    require('pycocotools', 'detection')
    from timm_depla.engine.detection.flags import create_detection_parser
    from timm_depla.engine.detection.train import train
    from timm_depla.engine.models import resumed_recipe

    parser = create_detection_parser()
    args = parse_args(parser)
    if not args.recipe:
        default = 'coco_1x' if args.data_dir else 'scenes'
        args = parse_args(parser, default_recipe=resumed_recipe(args) or default)
    return train(args)


if __name__ == '__main__':
    run_command('train_detection.py', main)
