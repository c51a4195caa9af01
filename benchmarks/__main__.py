"""`python -m benchmarks NAME` runs a benchmark, saves its record and writes docs/benchmarks.md."""

import argparse
import os
import re
import shlex
import sys
from html import escape
from importlib import import_module
from inspect import isgenerator
from typing import Any, Dict

from timm.utils import setup_default_logging

from . import gpu, record
from .flags import add_flags
from .pairs import KEEP_MEMORY

NAMES = (
    'grid', 'neck', 'speed', 'gpu', 'cost', 'bound', 'kernels', 'insertion', 'deploy',
    'throughput', 'versus', 'pipeline', 'feeding', 'crash', 'attack',
)  # fmt: skip
NETWORKS = ('timm_depla/layers', 'timm_depla/models')
MEASURED = {  # what of the package a benchmark measures, where it is not the networks
    'neck': ('timm_depla/layers', 'timm_depla/detection'),
    **dict.fromkeys(('throughput', 'versus', 'pipeline'), ('timm_depla/engine', 'timm_depla/data')),
    'feeding': ('timm_depla/data',),
    **dict.fromkeys(('crash', 'attack', 'gpu'), ('timm_depla',)),
}
BENCHMARKS = {name: import_module(f'benchmarks.{name}') for name in NAMES}
DOCS = record.ROOT / 'docs' / 'benchmarks.md'
OLDER = '\\*'
EARLIER = (
    'Commit 7087eaf has the tables of forms that are no longer in the code (`grid-paths-*`, `neck-paths`), and of '
    '`grid-bf16`, `grid-onnx`, `bound-batch32`, `speed-fishnet` and `speed-h100-batch32`; commit '
    '16c4994 has `block` (its floor), `init` and `scaling`, commit 33dcab2 has `maps` of the shipped digits.'
)


def records() -> Dict[str, Dict[str, Dict[str, Any]]]:
    """By benchmark its records by name, in the order of the page."""
    found: Dict[str, Dict[str, Dict[str, Any]]] = {benchmark: {} for benchmark in BENCHMARKS}
    for name in record.names():
        found[name.split('-')[0]][name] = record.load(name)
    return {benchmark: entries for benchmark, entries in found.items() if entries or benchmark == 'gpu'}


def render_summary() -> str:
    rows = []
    for benchmark, entries in records().items():
        for name, entry in entries.items():
            mark = '' if record.changes(entry) == [] else OLDER
            for row in getattr(BENCHMARKS[benchmark], 'summary', lambda _: [])(entry['results']):
                rows.append([*row, f'[{name}](#{name}){mark}'])
    return record.table(['what', 'ratio, unless it says otherwise', 'over, or on', 'section'], rows)


def render_origin(entry: Dict[str, Any]) -> str:
    """Where a record comes from: what has changed since, and folded its command and versions."""
    found = record.changes(entry)
    since = 'unknown' if found is None else ', '.join(f'<code>{escape(source)}</code>' for source in found)
    versions = ', '.join(f'{package} {version}' for package, version in entry['versions'].items())
    return (
        f'<details><summary>Commit {entry["commit"][:7]}, {entry["hardware"]}'
        f'{"; changed since: " if since else ""}{since}</summary><code>{escape(entry["command"])}</code>; {versions}.'
        '</details>'
    )


def render_docs() -> str:
    """The text of docs/benchmarks.md: a summary, and a section for each benchmark."""
    parts = [
        '# Benchmarks',
        'Models take turns with their base in one process, so ratios hold where times do not; on a CPU, glibc [keeps '
        'freed memory](training.md). In brackets are 95% intervals. The figures come from the records in '
        '`benchmarks/records/`, which hold more than the tables. Below each table stands what of the measured code has '
        f'changed since; {OLDER} marks such records here.',
        render_summary(),
    ]
    for benchmark, entries in records().items():
        parts += [f'## {benchmark}', BENCHMARKS[benchmark].__doc__.strip().replace('\n\n', '\n')]
        for name, entry in entries.items():
            text = BENCHMARKS[benchmark].render(entry['results'])
            if name != benchmark:
                parts += [f'### {name}', text]
            elif text.startswith('|'):
                parts += [text]
            else:  # a sentence that ends the paragraph
                parts[-1] += f'\n{text}'
            parts += [render_origin(entry)]
        if not entries:  # of a GPU, before there is one
            parts += [gpu.render(gpu.NOTHING), '`python -m benchmarks gpu`']
    return '\n\n'.join([*parts, '## earlier', EARLIER]) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
    commands = parser.add_subparsers(dest='name', required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        add_flags(command, **module.FLAGS)
        command.add_argument('--record', default=name, metavar='NAME', help=f'of its file, {name}[-SUFFIX]')
    commands.add_parser('docs', help='write docs/benchmarks.md from the records')
    args = parser.parse_args()
    setup_default_logging()
    if args.name != 'docs':
        if not re.fullmatch(rf'{args.name}(-[\w-]+)?', args.record):
            parser.error(f"--record must be '{args.name}' or '{args.name}-SUFFIX', not '{args.record}'")
        module = BENCHMARKS[args.name]
        measured = [*MEASURED.get(args.name, NETWORKS), f'benchmarks/{args.name}.py']
        command = f'python -m benchmarks {shlex.join(sys.argv[1:])}'
        found = module.run(args)
        for results in found if isgenerator(found) else [found]:
            record.save(args.record, command, vars(args), measured, results)
        print(module.render(results))
    DOCS.write_text(render_docs())


if __name__ == '__main__':
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, '-m', 'benchmarks', *sys.argv[1:]], {**os.environ, **KEEP_MEMORY})
    main()
