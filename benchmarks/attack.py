"""Mistakes and hostile files, drawn from seeds: each gives a message, never a traceback, a hang or silence.

A run folder is damaged in one place, gets a link or a pipe, or an args.yaml that asks for what only a user may ask for.
Each case runs what the command runs, in its own process, with a time limit. "Silent" is an invalid number that a flag
accepts, or a damaged checkpoint that is used. "Fetched" is a host that the user did not name, "written outside" a file
outside of the case's folder.
"""

import argparse
import collections
import hashlib
import io
import logging
import multiprocessing
import os
import random
import shutil
import socket
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple
from unittest.mock import Mock, patch

import torch

from timm_depla.data import digits_folder, scenes
from timm_depla.errors import UserError

from .attack_cases import CASES, attack_command, call
from .record import table

SECONDS = 120  # time limit of a case
OUTSIDE = 'written outside'
FLAGS = dict(
    kinds=dict(nargs='+', choices=CASES, default=list(CASES), metavar='KIND', help='all by default'),
    share=dict(type=float, default=1.0, metavar='X', help='of the cases of each kind'),
    seed=0,  # of the first case; the next ones count on
)


def _digest(*folders: Path) -> str:
    """What the files in folders hold."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob('*')):
        digest.update(f'{path}\0'.encode() + (path.read_bytes() if path.is_file() else b''))
    return digest.hexdigest()


def _case(attack: Callable[..., Optional[bool]], seed: int, target: Path, log: Path) -> None:
    """Run a case, in its own process; write its outcome and its output to `log`."""
    output, outcome = io.StringIO(), 'accepted'
    socket.getaddrinfo = look_ups = Mock(side_effect=socket.gaierror('no network in this benchmark'))
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(output), redirect_stderr(output):
        os.chdir(scratch)
        case, home, outside = (Path(scratch, name) for name in ('case', 'home', 'outside'))
        for folder in (case, home, outside):
            folder.mkdir()
        (home / '.bashrc').write_text('alias ll="ls -l"\n')
        (outside / 'victim').write_text('the only copy\n')
        os.environ.setdefault('XDG_CACHE_HOME', str(Path.home() / '.cache'))  # ours, which is nobody's own
        os.environ['HOME'], tempfile.tempdir = str(home), str(case)
        logging.getLogger().handlers.clear()
        before = _digest(home, outside)
        try:
            outcome = 'silent' if attack(random.Random(seed), case, target) else 'accepted'
        except (UserError, SystemExit) as error:
            outcome = 'unexpected' if ': unexpected ' in str(error) else 'refused'
            print(error)
        except BaseException:
            outcome = 'traceback'
            traceback.print_exc()
        if look_ups.called and attack is not attack_command:  # there, the user may have named it
            outcome = f'fetched {look_ups.call_args_list[0].args}'
        outcome = OUTSIDE if _digest(home, outside) != before else outcome
        outcome = 'executed' if list(Path(scratch).rglob('executed')) else outcome
        os.chdir('/')
        tempfile.tempdir = None
    log.write_text(f'{outcome}\n{output.getvalue()}')


def prepare(folder: Path) -> None:
    """Write the data and train the runs that the cases use."""
    with patch.object(scenes, 'IMAGES', {'train': 2, 'val': 2}):
        scenes.scenes_folder(folder / 'scenes')
    for path in sorted(digits_folder().glob('*/*/*.png'))[::9]:
        target = folder / 'few' / path.relative_to(digits_folder())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    common = ['--workers', 0, '--device', 'cpu', '--output', folder, '--experiment']
    few = [folder / 'few', '--recipe', 'digits', '--img-size', 32, '--epochs', 2, '--warmup-epochs', 1]
    call('train', *few, *common, 'classifier')
    few_scenes = [folder / 'scenes', '--recipe', 'scenes', '--epochs', 1, '--warmup-epochs', 0, '--batch-size', 2]
    call('train-detection', *few_scenes, *common, 'detector')


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Count the outcomes of each kind; list the seeds and last lines of the wrong ones."""
    results: Dict[str, Any] = {}
    context = multiprocessing.get_context('fork')
    torch.set_num_threads(1)  # forking is unsafe with more threads
    with tempfile.TemporaryDirectory() as scratch:
        runs, log = Path(scratch, 'runs'), Path(scratch, 'log')
        prepare(runs)
        for name in args.kinds:
            attack, target, count = CASES[name]
            count = max(1, round(count * args.share))
            outcomes, wrong = collections.Counter(), []
            for seed in range(args.seed, args.seed + count):
                log.write_text('hang\n')
                process = context.Process(target=_case, args=(attack, seed, runs / target, log))
                process.start()
                process.join(SECONDS)
                if process.is_alive():
                    process.kill()
                    process.join()
                outcome, *lines = log.read_text().split('\n')
                outcomes[outcome.split()[0] if outcome.startswith('fetched') else outcome] += 1
                if outcome not in ('accepted', 'refused'):
                    wrong.append(f'{seed} {outcome}: {" / ".join(line for line in lines if line.strip())[-400:]}')
                    print(name, wrong[-1], flush=True)
            results[name] = dict(cases=count, wrong=wrong, **outcomes)
    return results


def render(results: Dict[str, Any]) -> str:
    kinds = ['refused', 'accepted', 'traceback', 'unexpected', 'hang', 'silent', 'executed', 'fetched', OUTSIDE]
    rows = [[kind, *(found.get(kind, 0) for found in results.values())] for kind in kinds]
    never = ', '.join(kind for kind, *counts in rows if not any(counts))
    return f'No case: {never or "-"}.\n\n{table(["", *results], [row for row in rows if any(row[1:])])}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    cases = sum(found['cases'] for found in results.values())
    wrong = sum(len(found['wrong']) for found in results.values())
    return [
        ('mistakes and attacks without a message', f'{wrong} of {cases:,}', 'command lines, hostile files and others')
    ]
