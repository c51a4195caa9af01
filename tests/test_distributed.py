"""Two processes, by torchrun."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from timm_depla.data import digits_folder
from timm_depla.engine.classification.flags import create_validate_parser
from timm_depla.engine.classification.validate import validate
from timm_depla.engine.config import parse_args
from timm_depla.engine.errors import ConfigError

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']


def torchrun(*argv):
    command = [*TORCHRUN, *map(str, argv)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp('output')
    flags = [
        '--recipe',
        'digits',
        '--epochs',
        2,
        '--img-size',
        32,
        '--workers',
        1,
        '--model-ema',
        '--model-ema-decay',
        0.5,
    ]
    result = torchrun(ROOT / 'train.py', *flags, '--output', output, '--experiment', 'run')
    assert result.returncode == 0, result.stderr
    assert '2 processes x 64 images = 128 images an update' in result.stdout
    return output / 'run'


def test_validation_counts_as_one_process_does(run):
    row = list(csv.DictReader((run / 'summary.csv').open()))[-1]
    (result,) = validate(parse_args(create_validate_parser(), [str(run / 'last')]))
    assert 0 < result['top1'] < 100
    assert result['top1'] == round(float(row['eval_top1']), 4)
    assert result['top5'] == round(float(row['eval_top5']), 4)
    text = torchrun(ROOT / 'validate.py', run / 'last').stderr
    assert f'359 images: top-1 {result["top1"]:.2f}  top-5 {result["top5"]:.2f}' in text


def test_another_number_of_processes_is_refused(run):
    args = ['--recipe', 'digits', '--epochs', 2, '--img-size', 32, '--model-ema', '--model-ema-decay', 0.5]
    command = [sys.executable, ROOT / 'train.py', *args, '--resume', run]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert 'with other arguments: world size 2 -> 1' in result.stderr


def test_error_names_the_rank(tmp_path):
    result = torchrun(ROOT / 'train.py', tmp_path / 'nowhere')
    assert result.returncode != 0
    assert re.search(r"train.py \(rank [01]\): error: no data folder '.*nowhere'", result.stderr)


def test_bad_device(run):
    args = parse_args(create_validate_parser(), [str(run), '--device', 'nothing', '--data-dir', str(digits_folder())])
    with pytest.raises(ConfigError, match="cannot use device 'nothing'"):
        validate(args)
