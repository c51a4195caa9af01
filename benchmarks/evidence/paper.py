"""The paper's tables on ImageNet and COCO: the runs that they need, and their results beside the paper's.

Tables 1 to 3 are of `imagenet`, 4 and 5 of `coco`; the detectors of Table 5 start from the two classifiers that
`imagenet --table 5` trains. Each run has its own folder under `--output`, and starting it again resumes it. Rows that
the paper quotes from others are not run.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from ..record import ROOT, read_summary
from ..record import table as markdown
from .hours import estimate
from .report import PAPER

TABLES = {'imagenet': (1, 2, 3, 5), 'coco': (4, 5)}
_CLASSIFIERS = {  # the paper's rows and what they are here
    1: {
        'seresnet50++': 'seresnet50', 'seresnet101++': 'seresnet101', 'regnety_4g++': 'regnety_040',
        'regnety_8g++': 'regnety_080', 'resnet50_depla': 'resnet50_depla', 'seresnet50_depla': 'seresnet50_depla',
        'seresnet101_depla': 'seresnet101_depla',
    },
    2: {name: name for name in ('resnet50', 'seresnet50', 'resnet50_depla', 'seresnet50_depla')},
    3: {name: name for name in ('resnet50', 'resnet50_depla', 'resnet50_depla_adaptive')},
    5: {name: name for name in ('fishnet150', 'fishnet150_depla')},
}  # fmt: skip
_NECKS = (('fpn', None), ('fpn_depla', 0.2), ('fpn_depla', 0.5), ('fpn_depla', 1.0))


class PaperRun(NamedTuple):
    """A training that a table needs."""

    row: Tuple[Any, ...]  # the first columns of the paper's row
    metrics: Dict[str, List[str]]  # the paper's columns that it gives, and its own in summary.csv
    name: str  # of its folder
    argv: Tuple[str, ...]  # the script and its flags, without data and output


def paper_table(number: int) -> Dict[str, Any]:
    """The paper's table, its `columns` and `rows`."""
    printed = json.loads(PAPER.read_text())
    return next(entry for name, entry in printed.items() if name != 'source' and entry['table'] == number)


def runs(data: str, number: int, output: Path) -> List[PaperRun]:
    """The runs of a table. Runs of one name in several tables are one run."""
    if data == 'imagenet':
        recipe = 'better' if number == 1 else 'standard'
        metrics = {'top1': ['eval_top1']} if number < 5 else {}
        return [
            PaperRun((row,), metrics, f'{recipe}-{model}', ('train.py', '--recipe', recipe, '--model', model))
            for row, model in _CLASSIFIERS[number].items()
        ]
    sizes, found = ('AP', 'AP_S', 'AP_M', 'AP_L'), []
    if number == 4:
        metrics = {f'box_ap{size[2:].lower()}': [f'eval_{size}'] for size in sizes}
        for neck, temperature in _NECKS:
            argv = ('train_detection.py', '--recipe', 'coco_1x', '--model', f'maskrcnn_resnet50_{neck}')
            name = f'coco_1x-{neck}'
            if temperature is not None:
                name = f'{name}-{temperature}'
                argv = (*argv, '--model-kwargs', f"depla={{'temperature': {temperature}}}")
            found.append(PaperRun((neck, temperature), metrics, name, argv))
        return found
    for backbone in _CLASSIFIERS[5]:
        for detector, kinds in (('mask', ('mask', 'box')), ('faster', ('box',))):
            metrics = {
                f'{detector}_rcnn_{kind}_ap_s_m_l': [f'eval_{"mask_" * (kind == "mask")}{size}' for size in sizes]
                for kind in kinds
            }
            model, weights = f'{detector}rcnn_{backbone}_fpn', str(output / f'standard-{backbone}')
            argv = ('train_detection.py', '--recipe', 'coco_fishnet', '--model', model, '--pretrained-path', weights)
            found.append(PaperRun((backbone,), metrics, f'coco_fishnet-{model}', argv))
    return found


def command(run: PaperRun, args: argparse.Namespace) -> List[str]:
    """The command of a run, which starts or resumes it."""
    script, *flags = run.argv
    place = [str(args.folder), '--output', str(args.output), '--experiment', run.name, '--resume', 'auto']
    processes = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={args.processes}']
    return [sys.executable, *(processes if args.processes > 1 else ()), str(ROOT / script), *place, *flags, *args.flags]


def cost(run: PaperRun, args: argparse.Namespace) -> str:
    """Its epochs so far and the GPU-hours of one, measured, or else estimated."""
    rows = read_summary(args.output / run.name)
    if not rows and run.argv[0] != 'train.py':
        return 'not started, GPU-hours unknown'
    if not rows:
        found = estimate(*run.argv[2::2], args.processes)
        return (
            f'not started, estimated {found["epoch"]:.2g} H100-hours an epoch, {found["all"]:.3g} in all: '
            f'{found["arithmetic"]}; {found["cores"]} cores load {found["rate"]:.0f} images/s for each GPU'
        )
    seconds = sum(float(row['seconds']) for row in rows) / len(rows)
    return f'{len(rows)} epochs done, {args.processes * seconds / 3600:.3g} GPU-hours an epoch in training'


def report(data: str, number: int, output: Path) -> str:
    """The paper's table beside the best epochs of the runs that are there."""
    printed = paper_table(number)
    found: Dict[Tuple[Any, ...], Dict[str, str]] = {}
    for run in runs(data, number, output):
        rows = read_summary(output / run.name)
        for column, keys in run.metrics.items():
            scores = [row for row in rows if row[keys[0]]]
            if scores:
                best = max(scores, key=lambda row: float(row[keys[0]]))
                scale = 100 if 'AP' in keys[0] else 1
                values = ' '.join(f'{scale * float(best[key]):.1f}' for key in keys)
                found.setdefault(run.row, {})[column] = f'{values} (epoch {int(best["epoch"]) + 1})'
    keys = len(run.row)
    header, rows = printed['columns'][:keys], []
    for name in printed['columns'][keys:]:
        header += [name] if name == 'gflops' else [f"{name}, the paper's", f'{name}, ours']
    for row in printed['rows']:
        cells = ['' if key is None else key for key in row[:keys]]
        for name, value in zip(printed['columns'][keys:], row[keys:], strict=True):
            cells.append(' '.join(map(str, value)) if isinstance(value, list) else value)
            cells += [] if name == 'gflops' else [found.get(tuple(row[:keys]), {}).get(name, '')]
        rows.append(cells)
    return markdown(header, rows)


def slurm_script(run: PaperRun, args: argparse.Namespace) -> str:
    """A job of one node that is sent again until its run has ended."""
    if '\n' in f'{args.output}{args.folder}':
        raise SystemExit('--output and DIR must be without line breaks, which would end a line of the job script')
    lines = [
        '#!/bin/bash', f'#SBATCH --job-name={run.name}', '#SBATCH --nodes=1 --ntasks-per-node=1',
        f'#SBATCH --gpus-per-node={args.processes} --signal=TERM@120 --requeue',
        f'#SBATCH --output={shlex.quote(f"{args.output / run.name}-%j.log")}',
        f'srun {shlex.join(command(run, args))}', '',
    ]  # fmt: skip
    return '\n'.join(lines)


def add_args(parser: argparse.ArgumentParser, data: str) -> None:
    parser.add_argument('folder', metavar='DIR', type=Path, help='the data, as for the training script')
    parser.add_argument('--table', type=int, required=True, choices=TABLES[data], help="of the paper's")
    parser.add_argument('--output', type=Path, default=Path('output'), metavar='DIR', help='folder of the runs')
    parser.add_argument('--processes', type=int, default=8, metavar='N', help='of a run, one for each GPU')
    action = parser.add_mutually_exclusive_group()
    action.add_argument('--submit', action='store_true', help='train them, one after the other')
    action.add_argument('--slurm', action='store_true', help='write a job script for each')
    action.add_argument('--report', action='store_true', help="print the paper's table beside theirs")
    last = dict(nargs=argparse.REMAINDER, default=[], metavar='FLAG')
    parser.add_argument('--flags', **last, help='what follows goes to every run, as --batch-size 64 for fewer GPUs')


def main(data: str, args: argparse.Namespace) -> Optional[int]:
    """Print the runs, train them, write their job scripts, or report."""
    if args.report:
        print(report(data, args.table, args.output))
        return None
    for run in runs(data, args.table, args.output):
        print(f'{run.name}: {cost(run, args)}\n  {shlex.join(command(run, args))}', flush=True)
        if args.submit:
            done = subprocess.run(command(run, args))
            if done.returncode:
                return done.returncode
        elif args.slurm:
            args.output.mkdir(parents=True, exist_ok=True)
            path = args.output / f'{run.name}.slurm'
            path.write_text(slurm_script(run, args))
            print(f'  sbatch {path}')
    return None
