#!/usr/bin/env python3
"""Train an image classifier: `python train.py` on the embedded digits, `python train.py DIR` on a folder of images."""

from timm_depla.commands import run

if __name__ == '__main__':
    run('train')
