"""The command `timm-depla VERB`, also `python -m timm_depla VERB`; the scripts of the repository run one verb each."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import List, Optional

import timm_depla

from .engine.distributed import run_command
from .errors import require

__all__ = ['VERBS', 'main', 'run']

VERBS = {
    'train': ('timm_depla.engine.classification.train', 'train an image classifier'),
    'validate': ('timm_depla.engine.classification.validate', 'validate runs, checkpoints and models'),
    'train-detection': ('timm_depla.engine.detection.train', 'train a detector'),
    'validate-detection': ('timm_depla.engine.detection.validate', 'average precision of a detector'),
    'predict': ('timm_depla.predict', 'classify images, or detect objects in them'),
    'visualize': ('timm_depla.visualize', 'draw what the DEPLA blocks see in an image'),
    'demo': ('timm_depla.demo', 'a page that shows it'),
    'publish': ('timm_depla.hub.publish', 'write the repository folder of a run, and push it to the Hub'),
}
"""The module of each verb, whose function `main` reads the command line, and what the verb does."""


def run(verb: str) -> None:
    """Run a verb on the command line, under the name in `sys.argv[0]`; does not return."""
    name, module = Path(sys.argv[0]).name, VERBS[verb][0]

    def call() -> Optional[int]:
        if verb.endswith('-detection'):
            require('pycocotools', 'detection')
        return import_module(module).main()

    run_command(name, call)


def main(argv: Optional[List[str]] = None) -> None:
    """Run `timm-depla VERB ...`."""
    width = max(map(len, VERBS))
    epilog = '\n'.join(f'  {verb:{width}}  {what}' for verb, (_, what) in VERBS.items())
    parser = argparse.ArgumentParser(
        'timm-depla',
        'timm-depla VERB ...',
        f'Aggregation with Feature Detection for timm.\n\n{epilog}',
        '`timm-depla VERB --help` lists the flags of a verb.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'timm-depla {timm_depla.__version__}')
    parser.add_argument('verb', choices=VERBS, help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    verb = parser.parse_args(argv[:1] or ['--help']).verb
    sys.argv = [f'timm-depla {verb}', *argv[1:]]
    run(verb)
