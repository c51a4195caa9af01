#!/usr/bin/env python3
"""Average precision of a detector: `python validate_detection.py RUN`, or another checkpoint with `--data-dir DIR`."""

import timm_depla  # noqa: F401  (registers the models)
from timm_depla.engine.config import parse_args
from timm_depla.engine.errors import require
from timm_depla.engine.world import run_command


def main() -> None:
    require('pycocotools', 'detection')
    from timm_depla.engine.detection.flags import create_detection_validate_parser
    from timm_depla.engine.detection.validate import validate

    validate(parse_args(create_detection_validate_parser()))


if __name__ == '__main__':
    run_command('validate_detection.py', main)
