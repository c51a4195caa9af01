#!/usr/bin/env python3
"""Write docs/session.md by running its commands: `python docs/session.py`."""

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
    'ls demo/images demo/images/cat | head -n 12',
    'python train.py demo/images',
    TRAIN,
    'python validate.py output/first',
    'timm-depla predict output/first demo/whole --output sheet.jpg predictions.csv',
    'head -n 4 predictions.csv',
)
PAGE = """# A first session

From a folder of photographs without splits to a sheet of predictions, on a terminal: {seconds:.0f} seconds on two CPU
cores. `python docs/session.py` runs the commands and writes this page. `demo/images` has crops of six photographs of
scikit-image and scikit-learn, a folder for each; take a folder of your own instead. The network is a tiny ResNet with
DEPLA, from random weights.

```console
{transcript}
```

![Six photographs, each with its most probable classes](gallery/sheet.jpg)

Each photograph gets its own class. Some of its crops were in the training set: this shows the steps, not the network's
worth. Ctrl-C saves and ends a training, and `python train.py --resume output/first` resumes it, bit for bit. Next:
[your own images from pretrained weights](finetune.md), [what the network sees](gallery.md), [all of
training](training.md).
"""


def transcribe(folder: Path, commands=COMMANDS) -> str:
    """The commands and what they print, run in a folder that has what the repository has."""
    for name in ('docs', 'train.py', 'validate.py'):
        (folder / name).symlink_to(ROOT / name)
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    python_path = f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
    text = []
    for command in commands:
        done = subprocess.run(
            ['bash', '-c', command],
            cwd=folder,
            env={**os.environ, 'PATH': path, 'PYTHONPATH': python_path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = re.sub(r'^(Loading pretrained|Found preferred|Loaded ).*\n', '', done.stdout, flags=re.MULTILINE)
        text += [f'$ {command}', lines.rstrip()]
    return '\n'.join(text)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        transcript = transcribe(Path(scratch))
        seconds = time.monotonic() - start
        Image.open(Path(scratch, 'sheet.jpg')).save(ROOT / 'docs/gallery/sheet.jpg', quality=80)
    (ROOT / 'docs/session.md').write_text(PAGE.format(seconds=seconds, transcript=transcript))


if __name__ == '__main__':
    main()
