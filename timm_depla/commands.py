"""The command `timm-depla VERB`, also `python -m timm_depla VERB`; the scripts of the repository run one verb each."""

import argparse
import logging
import os
import signal
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, List, Optional

import torch.distributed as dist
from timm.utils import setup_default_logging

import timm_depla

from .errors import UserError, require
from .files import escape
from .schema import shorten

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


def _escape_names() -> None:
    """Show the control characters of names in log messages, which could fake lines or drive the terminal."""
    create = logging.getLogRecordFactory()

    def create_escaped(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = create(*args, **kwargs)
        record.msg = escape(str(record.msg), is_list=True)
        if isinstance(record.args, tuple):
            record.args = tuple(a if isinstance(a, (int, float)) else escape(str(a)) for a in record.args)
        return record

    logging.setLogRecordFactory(create_escaped)


def run_command(name: str, main: Any) -> None:
    """Run a command's main function; exit with the message of a UserError, or with 128 + signal if interrupted."""
    setup_default_logging()
    logging.raiseExceptions = False  # the death of a worker can interrupt the writing of a line
    _escape_names()
    for library in ('httpx', 'httpx2'):  # they log each request to the Hub
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        code = main()
    except KeyboardInterrupt:
        os.write(2, f'\n{name}: interrupted\n'.encode())
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
            named = f'{shorten(error.filename)}: {error.strerror}' if isinstance(error, OSError) else str(error)
            rank = os.environ.get('RANK')
            sys.exit(f'{name}{f" (rank {rank})" if rank else ""}: error: {escape(named, is_list=True)}')
        with tempfile.NamedTemporaryFile('w', prefix=f'{name.replace(" ", "-")}-', suffix='.log', delete=False) as file:
            traceback.print_exc(file=file)
        first = (str(error).strip().splitlines() or [''])[0]
        sys.exit(f'{name}: unexpected {type(error).__name__}: {escape(first)} (the traceback is in {file.name})')
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code or 0)


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
