#!/usr/bin/env python3
"""Validate image classifiers: `python validate.py RUN`, or checkpoints and models with `--data-dir DIR`."""

from timm_depla.commands import run

if __name__ == '__main__':
    run('validate')
