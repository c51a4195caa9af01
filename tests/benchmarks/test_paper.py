"""The runs that the paper's tables need, end to end on the digits in place of ImageNet."""

import re
import shlex
import sys
from functools import partial

import pytest
import timm
from helpers import ROOT, run
from safetensors.torch import save_model

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import hours, paper
from timm_depla.data import digits_folder
from timm_depla.detection.rcnn import split_name
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args
from timm_depla.engine.detection.flags import create_detection_parser


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Ten classes of ImageNet's layout, with a few digits each."""
    root = tmp_path_factory.mktemp('data') / 'imagenet'
    for split, name, count in (('train', 'train', 8), ('validation', 'val', 4)):
        for digit in range(10):
            (folder := root / name / f'n{1440764 + digit:08}').mkdir(parents=True)
            for image in sorted((digits_folder() / split / str(digit)).iterdir())[:count]:
                (folder / image.name).with_suffix('.JPEG').symlink_to(image)
    return root


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


def call(monkeypatch, capfd, *argv):
    """Do what `python -m benchmarks.evidence` does; returns what it prints, and the runs that it starts."""
    monkeypatch.setattr(sys, 'argv', ['evidence', *map(str, argv)])
    assert not evidence.main()
    return capfd.readouterr()


def test_costs_are_estimates_before_they_are_measured(tmp_path, monkeypatch, capfd):
    place = ('--output', tmp_path, '--table')
    coco = partial(call, monkeypatch, capfd, 'coco', '/coco', *place)
    out = call(monkeypatch, capfd, 'imagenet', '/imagenet', *place, 3, '--processes', 1).out
    found = re.findall(r'estimated (\S+) H100-hours an epoch, (\S+) in all: 1,281,167 / 256 steps x (\S+) ms', out)
    assert len(found) == 3
    for epoch, total, step in (map(float, row) for row in found):  # by the standard recipe
        assert epoch == pytest.approx(1_281_167 / 256 * step / 3.6e6, rel=0.05)
        assert total == pytest.approx(100 * epoch, rel=0.05)
    assert float(found[0][2]) == 65.7 < float(found[1][2]) < 80  # of resnet50, which was measured
    assert coco(5).out.count('GPU-hours unknown') == 4
    coco(4, '--slurm')
    script = (tmp_path / 'coco_1x-fpn_depla-0.2.slurm').read_text()
    words = shlex.split(script.splitlines()[-1])
    assert words[0] == 'srun' and "depla={'temperature': 0.2}" in words and '--nproc-per-node=8' in words


def test_the_hours_of_the_page():
    text = (ROOT / 'docs' / 'imagenet.md').read_text()
    assert re.search(r'<!-- hours -->\n(.*)\n<!-- end -->', text, re.DOTALL)[1] == hours.render()


@pytest.mark.slow
def test_the_commands_of_the_page(imagenet, tmp_path):
    """On a local file of timm's weights, as far as sizes and the Hub allow."""
    weights = tmp_path / 'resnet18.safetensors'
    save_model(timm.create_model('resnet18', num_classes=10), weights)
    block = re.search(r'```sh\n(.*?)```', (ROOT / 'docs' / 'imagenet.md').read_text(), re.DOTALL)[1]
    for line in block.splitlines():
        line = line.replace('/imagenet', str(imagenet), line.startswith('python train.py'))
        line = re.sub(r'(output|published)/', rf'{tmp_path}/\1/', re.sub(r'--push \S+', '', line))
        argv = shlex.split(line)[1:]
        argv += [] if 'publish' in line else ['--workers', 0, '--device', 'cpu']
        if 'train.py' in line:
            argv += ['--model', 'resnet18_depla', '--initial-checkpoint', weights, '--epochs', 1, '--warmup-epochs', 0]
            argv += ['--batch-size', 16, '--img-size', 32, '--no-amp', '--output', tmp_path / 'output']
            assert '26 of DEPLA new' in run(*argv).stderr
        elif 'validate.py' in line:
            assert '40 images: top-1' in run(*argv, '--img-size', 32, '--no-amp').stderr
        else:
            run(*argv)
    assert 'ImageNet-1k' in (tmp_path / 'published' / 'resnet50_depla.ft_in1k' / 'README.md').read_text()


@pytest.mark.slow
def test_a_table_from_start_to_end(imagenet, tmp_path, monkeypatch, capfd):
    table = ('imagenet', imagenet, '--table', 3, '--output', tmp_path, '--processes', 1)
    act = partial(call, monkeypatch, capfd, *table)
    flags = ('--flags', '--epochs', 1, '--warmup-epochs', 0, '--img-size', 32, '--batch-size', 16, '--device', 'cpu')
    act('--submit', *flags, '--workers', 0)
    rows = act('--report').out.splitlines()[2:]
    assert [row.split(' | ')[0] for row in rows] == ['| resnet50', '| resnet50_depla', '| resnet50_depla_adaptive']
    assert all(re.search(r'\| 7\d\.\d \| \d+\.\d \(epoch 1\) \|$', row) for row in rows)
    again = act('--submit', *flags, '--workers', 0)
    assert again.out.count('1 epochs done, ') == 3 and 'resuming from' in again.err
