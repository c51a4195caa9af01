#!/usr/bin/env python3
"""Average precision of a detector: `python validate_detection.py RUN`, or another checkpoint with `--data-dir DIR`."""

from timm_depla.commands import run

if __name__ == '__main__':
    run('validate-detection')
