"""`python -m benchmarks NAME` runs a benchmark, saves its record, writes docs/benchmarks.md and draws its plots."""

import argparse
import shlex
import sys
from importlib import import_module
from pathlib import Path

from timm.utils import setup_default_logging

from . import record

NAMES = (
    'attack', 'block', 'bound', 'cost', 'crash', 'deploy', 'feeding', 'finetune', 'grid', 'init', 'insertion', 'maps',
    'neck', 'pipeline', 'scaling', 'speed', 'throughput', 'versus',
)  # fmt: skip
BENCHMARKS = {name: import_module(f'benchmarks.{name}') for name in NAMES}
DOCS = Path(__file__).parent.parent / 'docs' / 'benchmarks.md'


PLOTTED = ('grid', 'scaling', 'speed-rivals')  # records whose plot adds to their table


def render_docs() -> str:
    """The text of docs/benchmarks.md: a section for each record."""
    parts = ['# Benchmarks', 'Each table comes from a record in `benchmarks/records/`, by the command below it.']
    for name in record.names():
        entry = record.load(name)
        module = BENCHMARKS[name.split('-')[0]]
        versions = ', '.join(f'{package} {version}' for package, version in entry['versions'].items())
        parts += [
            f'## {name}',
            module.__doc__.strip(),
            module.render(entry['results']),
            *([f'![{name}, drawn](plots/{name}.svg)'] if name in PLOTTED else []),
            f'`{entry["command"]}` at commit {entry["commit"][:12]}; {versions}; {entry["hardware"]}.',
        ]
    return '\n\n'.join(parts) + '\n'


def draw_plots() -> None:
    """Draw the plots of docs/benchmarks.md from the records; the same records give the same bytes."""
    folder = DOCS.parent / 'plots'
    folder.mkdir(exist_ok=True)
    for name in set(PLOTTED) & set(record.names()):
        module = BENCHMARKS[name.split('-')[0]]
        record.save_plot(module.plot(record.load(name)['results']), folder / f'{name}.svg')


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__)
    commands = parser.add_subparsers(dest='name', required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.__doc__.strip(), description=module.__doc__)
        module.add_args(command)
        command.add_argument('--record', default=name, metavar='NAME', help=f'file of the record, {name}[-SUFFIX]')
    commands.add_parser('docs', help='write docs/benchmarks.md and its plots from the records')
    args = parser.parse_args()
    setup_default_logging()
    if args.name != 'docs':
        module = BENCHMARKS[args.name]
        results = module.run(args)
        record.save(args.record, f'python -m benchmarks {shlex.join(sys.argv[1:])}', vars(args), results)
        print(module.render(results))
    DOCS.write_text(render_docs())
    draw_plots()


if __name__ == '__main__':
    main()
