"""Training and validation in two processes, by torchrun."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, TORCHRUN, run, summary, validate

from timm_depla.engine.distributed import Interrupt, World

FLAGS = [*SMALL, '--epochs', 2, '--workers', 1, '--model-ema', '--model-ema-decay', 0.5]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp('output')
    result = run(*TORCHRUN, ROOT / 'train.py', *FLAGS, '--output', output, '--experiment', 'run')
    assert '2 processes x 64 images = 128 images an update' in result.stdout
    return output / 'run'


def test_validation_counts_as_one_process_does(trained):
    row = summary(trained)[-1]
    (result,) = validate(trained / 'last')
    assert 0 < result['top1'] < 100
    better = max(('eval_', 'eval_plain_'), key=lambda kind: float(row[f'{kind}top1']))
    assert result['top1'] == round(float(row[f'{better}top1']), 4)
    assert result['top5'] == round(float(row[f'{better}top5']), 4)
    text = run(*TORCHRUN, ROOT / 'validate.py', trained / 'last').stderr
    assert f'359 images: top-1 {result["top1"]:.2f}  top-5 {result["top5"]:.2f}' in text


def test_another_number_of_processes_is_refused(trained):
    result = run('train.py', *FLAGS, '--resume', trained, fails=True)
    assert 'with other arguments: world size 2 -> 1' in result.stderr


def test_error_names_the_rank(tmp_path):
    result = run(*TORCHRUN, ROOT / 'train.py', tmp_path / 'nowhere', fails=True)
    assert re.search(r"train.py \(rank [01]\): error: no data folder '.*nowhere'", result.stderr)


@pytest.mark.parametrize('rank', [0, 1])
def test_lost_rank_is_named(rank, tmp_path):
    """One of two processes is killed; the other ends with a message, not with a traceback of the communication."""
    flags = [*SMALL, '--epochs', 50, '--log-interval', 1, '--output', tmp_path, '--experiment', 'run']
    command = [sys.executable, *TORCHRUN, ROOT / 'train.py', *flags]
    log = tmp_path / 'log'
    with log.open('w') as file:
        process = subprocess.Popen([str(c) for c in command], stdout=file, stderr=file)
    while 'step 3/' not in log.read_text() and process.poll() is None:
        time.sleep(0.1)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(children[rank]), signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    text = log.read_text()
    assert f'train.py (rank {1 - rank}): error: lost the connection to rank {rank}, which was killed' in text, text
    assert 'gloo' not in text and 'take_step' not in text


def test_both_warnings_of_a_time_limit_are_remembered_and_then_ignored():
    world = World(torch.device('cpu'))
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        with Interrupt(world) as interrupt:
            os.kill(os.getpid(), number)
            assert interrupt.signal == number
        os.kill(os.getpid(), number)  # by default it would end the process
