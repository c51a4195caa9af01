"""Does DEPLA help, and which of its choices matter? Trains the networks of docs/evidence.md and writes the tables."""

import argparse
from fnmatch import fnmatch
from typing import Optional

import torch

from timm_depla.commands import run_command

from . import paper, report, scattered, starts, study
from .arms import ARMS
from .proxies import PROXIES

DATA = (*PROXIES, 'scenes')


def main() -> Optional[int]:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.evidence', description=__doc__)
    commands = parser.add_subparsers(dest='name', required=True)
    data = commands.add_parser('data', help=scattered.__doc__.splitlines()[0], description=scattered.__doc__)
    scattered.add_args(data)
    run = commands.add_parser('run', help='train what is not on record yet', description=study.__doc__)
    run.add_argument('data', choices=DATA, metavar='DATA', help=f'one of {", ".join(DATA)}')
    run.add_argument('arms', nargs='+', metavar='ARM', help=f'arms, with wildcards: {", ".join(ARMS)}')
    run.add_argument('--jobs', type=int, default=2, help='networks to train at a time, each on one thread')
    train = commands.add_parser('train', help='train one network, on record or not, and record it')
    train.add_argument('data', choices=DATA, metavar='DATA', help=f'one of {", ".join(DATA)}')
    train.add_argument('arm', choices=ARMS, metavar='ARM', help=f'one of {", ".join(ARMS)}')
    train.add_argument('--seed', type=int, default=0)
    train.add_argument('--lr', type=float, help='learning rate; the one chosen for the arm by default')
    early = commands.add_parser('starts', help=starts.__doc__.splitlines()[0], description=starts.__doc__)
    early.add_argument('--seed', type=int, default=0)
    for command in (run, train):
        command.add_argument('--device', default='cpu', help="'cpu' or 'cuda'")
    for name in paper.TABLES:
        parts = commands.add_parser(name, help=f"the runs of the paper's tables on {name}", description=paper.__doc__)
        paper.add_args(parts, name)
    commands.add_parser('docs', help='write the tables and plots of docs/evidence.md from the records')
    args = parser.parse_args()
    if args.name in ('train', 'starts'):
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # sharp maps have denormal gradients, which are slow
    if args.name == 'data':
        scattered.write(args.folder, scattered.SETS[args.set])
    elif args.name == 'run':
        chosen = [arm for arm in ARMS if any(fnmatch(arm, pattern) for pattern in args.arms)]
        study.run(args.data, chosen, args.jobs, args.device)
    elif args.name == 'starts':
        starts.run(args.seed)
    elif args.name == 'train':
        rate = args.lr or study.best_rate(args.data, args.arm)
        if rate is None:
            parser.error(f"no learning rate is chosen yet for '{args.arm}': give --lr")
        job = study.Job(args.data, args.arm, args.seed, rate)
        for key, values in study.train(job, args.device)['results'].items():
            print(key, values[-1])
    elif args.name in paper.TABLES:
        return paper.main(args.name, args)
    else:
        report.write()


if __name__ == '__main__':
    run_command('benchmarks.evidence', main)
