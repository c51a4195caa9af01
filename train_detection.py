#!/usr/bin/env python3
"""Train a detector: `python train_detection.py` on digits in scenes, `python train_detection.py DIR` on COCO data."""

from timm_depla.commands import run

if __name__ == '__main__':
    run('train-detection')
