#!/usr/bin/env python3
"""Write the transcript of docs/session.md by running its commands: `python docs/session.py`."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
TRAIN = (
    'python train.py demo/images --val-fraction 0.2 --recipe finetune --model test_resnet_depla --backbone-lr-scale 1 '
    '--img-size 128 --batch-size 16 --epochs 8 --lr 0.004 --experiment first'
)
COMMANDS = (
    'python docs/photographs.py demo',
    'python train.py demo/images',
    TRAIN,
    'python validate.py output/first',
    'timm-depla predict output/first demo/whole --output sheet.jpg predictions.csv',
    'head -n 4 predictions.csv',
)


def transcribe(folder: Path, commands=COMMANDS) -> str:
    """The commands and what they print, run in a folder that has what the repository has."""
    for name in ('docs', 'train.py', 'validate.py'):
        (folder / name).symlink_to(ROOT / name)
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    env = {**os.environ, 'PATH': path, 'PYTHONPATH': f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'}
    text = []
    for command in commands:
        output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        done = subprocess.run(['bash', '-c', command], cwd=folder, env=env, **output)
        lines = re.sub(r'^(Loading pretrained|Found preferred|Loaded ).*\n', '', done.stdout, flags=re.MULTILINE)
        text += [f'$ {command}', lines.rstrip()]
    return '\n'.join(text)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        transcript = transcribe(Path(scratch))
        seconds = time.monotonic() - start
        Image.open(Path(scratch, 'sheet.jpg')).save(ROOT / 'docs/gallery/sheet.jpg', quality=80)
    page = ROOT / 'docs/session.md'
    before, _, after = re.sub(r'\d+ seconds', f'{seconds:.0f} seconds', page.read_text(), count=1).split('```')
    page.write_text(f'{before}```console\n{transcript}\n```{after}')


if __name__ == '__main__':
    main()
