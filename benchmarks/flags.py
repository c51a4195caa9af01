"""The flags that several benchmarks have."""

import argparse
from typing import Any

HELP = dict(
    model='what to measure',
    base='what to compare it with',
    path='forms of the model, see `speed`',
    batch_size='images',
    img_size='side of the images in pixels',
    pairs='timings of each',
    epochs='epochs of each training',
    seed='of the random numbers',
)


def add_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add a flag for each default: `img_size=224` is `--img-size`, and a list takes several values."""
    for name, default in defaults.items():
        is_list = isinstance(default, (list, tuple))
        kind = type(default[0]) if is_list and default else str if is_list else type(default)
        several = dict(nargs='*') if is_list else {}
        parser.add_argument(f'--{name.replace("_", "-")}', type=kind, default=default, help=HELP[name], **several)
