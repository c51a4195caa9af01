"""The runs that the paper's tables need, end to end on the digits in place of ImageNet."""

import re
import shlex

import pytest
import timm
from helpers import run

from benchmarks.evidence import paper
from timm_depla.data import digits_folder
from timm_depla.detection.rcnn import split_name
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args
from timm_depla.engine.detection.flags import create_detection_parser

COMMAND = ('-m', 'benchmarks.evidence')


@pytest.mark.parametrize(
    'data,number', [(data, number) for data, numbers in paper.TABLES.items() for number in numbers]
)
def test_runs_are_of_the_table(data, number, tmp_path, capsys):
    """Each gives a row and columns of the paper's table, by a command that parses, of a model that exists."""
    printed = paper.paper_table(number)
    for each in paper.runs(data, number, tmp_path):
        assert list(each.row) in [row[: len(each.row)] for row in printed['rows']]
        assert set(each.metrics) <= set(printed['columns'])
        script, *flags = each.argv
        parser = create_train_parser() if script == 'train.py' else create_detection_parser()
        args = parse_args(parser, flags)
        model = args.model if script == 'train.py' else split_name(args.model)[1]
        assert timm.is_model(model), model


def test_costs_are_measured_or_unknown(tmp_path):
    out = run(*COMMAND, 'imagenet', '/imagenet', '--table', 1, '--output', tmp_path).stdout
    assert out.count('not started, GPU-hours unknown') == 7 and 'GPU-hours an epoch' not in out
    run(*COMMAND, 'coco', '/coco', '--table', 4, '--output', tmp_path, '--slurm')
    script = (tmp_path / 'coco_1x-fpn_depla-0.2.slurm').read_text()
    words = shlex.split(script.splitlines()[-1])
    assert words[0] == 'srun' and "depla={'temperature': 0.2}" in words and '--nproc-per-node=8' in words


@pytest.mark.slow
def test_a_table_from_start_to_end(tmp_path):
    for split in ('train', 'validation'):
        (tmp_path / 'images' / split).mkdir(parents=True)
        for digit in '123':
            (tmp_path / 'images' / split / digit).symlink_to(digits_folder() / split / digit)
    table = ('imagenet', tmp_path / 'images', '--table', 3, '--output', tmp_path, '--processes', 1)
    flags = ('--flags', '--epochs', 1, '--warmup-epochs', 0, '--img-size', 32, '--batch-size', 64, '--device', 'cpu')
    run(*COMMAND, *table, '--submit', *flags)
    rows = run(*COMMAND, *table, '--report').stdout.splitlines()[2:]
    assert [row.split(' | ')[0] for row in rows] == ['| resnet50', '| resnet50_depla', '| resnet50_depla_adaptive']
    assert all(re.search(r'\| 7\d\.\d \| \d+\.\d \(epoch 1\) \|$', row) for row in rows)
    again = run(*COMMAND, *table, '--submit', *flags)
    assert again.stdout.count('1 epochs done, ') == 3 and 'resuming from' in again.stderr
