"""Does DEPLA help, and which of its choices matter? Trains the networks of docs/evidence.md and writes the tables."""

import argparse
from fnmatch import fnmatch
from pathlib import Path
from typing import Optional

import torch

from timm_depla.commands import run_command
from timm_depla.errors import as_config_error
from timm_depla.files import check_writable

from . import hours, paper, report, study
from .instruments import INSTRUMENTS
from .variants import VARIANTS


def main() -> Optional[int]:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.evidence', description=__doc__)
    commands = parser.add_subparsers(dest='name', required=True)
    run = commands.add_parser('run', help='train what is not on record yet', description=study.__doc__)
    train = commands.add_parser('train', help='train one network, on record or not, and record it')
    for command in (run, train):
        command.add_argument('data', choices=INSTRUMENTS, metavar='DATA', help=f'one of {", ".join(INSTRUMENTS)}')
        command.add_argument('--device', default='cpu', help="'cpu' or 'cuda'")
    run.add_argument('variants', nargs='+', metavar='VARIANT', help='variants, with wildcards')
    run.add_argument('--jobs', type=int, default=2, help='networks to train at a time, each on one thread')
    train.add_argument('variant', choices=VARIANTS, metavar='VARIANT', help=f'one of {", ".join(VARIANTS)}')
    train.add_argument('--seed', type=int, default=0)
    train.add_argument('--lr', type=float, help='learning rate; the one chosen for the variant by default')
    train.add_argument('--maps', type=Path, metavar='FILE', help='measure the maps of DEPLA and draw those of an image')
    for name in paper.TABLES:
        parts = commands.add_parser(name, help=f"the runs of the paper's tables on {name}", description=paper.__doc__)
        paper.add_args(parts, name)
    commands.add_parser('hours', help=hours.__doc__.splitlines()[0], description=hours.__doc__)
    commands.add_parser('docs', help='write the tables and plots of docs/evidence.md from the records')
    args = parser.parse_args()
    if args.name == 'run':
        known = INSTRUMENTS[args.data].variants
        chosen = [variant for variant in known if any(fnmatch(variant, pattern) for pattern in args.variants)]
        if not chosen:
            parser.error(f"no variant of '{args.data}' is so named: {', '.join(known)}")
        study.run(args.data, chosen, args.jobs, args.device)
    elif args.name == 'train':
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # sharp maps have denormal gradients, which are slow
        rate = args.lr or study.best_rate(args.data, args.variant)
        if rate is None:
            parser.error(f"no learning rate is chosen yet for '{args.variant}': give --lr")
        if args.maps and (INSTRUMENTS[args.data].images is None or 'depla' not in VARIANTS[args.variant].model):
            parser.error(f"--maps needs DEPLA and drawn images, not '{args.variant}' on '{args.data}'")
        if args.maps:
            with as_config_error('--maps: '):
                check_writable(args.maps)
        job = study.Job(args.data, args.variant, args.seed, rate)
        for key, values in study.train(job, args.device, args.maps)['results'].items():
            print(key, values if key == 'maps' else values[-1])
    elif args.name in paper.TABLES:
        return paper.main(args.name, args)
    elif args.name == 'hours':
        print(hours.render())
    else:
        report.write()


if __name__ == '__main__':
    run_command('benchmarks.evidence', main)
