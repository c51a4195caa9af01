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


def add_flags(parser: argparse.ArgumentParser, **flags: Any) -> None:
    """Add a flag for each default: `img_size=224` is `--img-size`, and a list takes several values.

    In the place of a default may be the options of `add_argument`; without one the argument is positional.
    """
    for name, options in flags.items():
        if not isinstance(options, dict):
            several = dict(nargs='*') if isinstance(options, list) else {}
            kind = type((options or [''])[0]) if several else type(options)
            options = dict(type=kind, default=options, help=HELP[name], **several)
        parser.add_argument(f'--{name.replace("_", "-")}' if 'default' in options else name, **options)
