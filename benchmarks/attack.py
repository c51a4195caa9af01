"""Mistakes and damaged files, drawn from seeds: each gives an error message, never a traceback, a hang or silence.

Command lines combine a script's flags with valid and invalid values. A run folder is damaged in one place, then
validated and resumed. One value of a COCO file is replaced. Images are truncated, changed or replaced by another file.
Each case has its own process and a time limit. "Accepted in silence" counts invalid numbers that a flag accepted, and
damaged checkpoints that were used.
"""

import argparse
import collections
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import huggingface_hub.constants
import numpy as np
import torch
import yaml
from PIL import Image

from timm_depla.data.scenes import scenes_folder
from timm_depla.detection.coco import CocoDetection
from timm_depla.engine.classification import flags as classification_flags
from timm_depla.engine.classification import train as train_module
from timm_depla.engine.classification import validate as validate_module
from timm_depla.engine.config import parse_args
from timm_depla.engine.detection import flags as detection_flags
from timm_depla.engine.detection import train as detection_train
from timm_depla.engine.detection import validate as detection_validate
from timm_depla.engine.errors import UserError
from timm_depla.files import open_image
from timm_depla.hub.publish import create_publish_parser, publish

from .record import table

SECONDS = 120  # time limit of a case
NONSENSE = ('nan', 'inf', '-inf', '1e999', 'x', '--')
VALUES = (
    *NONSENSE, '-7', '9' * 40, '0', '1', '2', '0.5', '3', '64', '', ' ', 'None', '[]', "{'a': 1}", '../x', 'cpu',
    'resnet18', 'wds/', 'pipe:touch executed', '$(touch executed)', '/etc/passwd',
)  # fmt: skip
VALIDATIONS = {
    'validate': (classification_flags.create_validate_parser, validate_module.validate, 'classifier'),
    'validate_detection': (detection_flags.create_detection_validate_parser, detection_validate.validate, 'detector'),
}
JUNK = (None, True, -1, 0, 2**70, 1e308, math.nan, '', 'x', '../x', [], {}, [[]], [1, 2, 3], {'a': 1}, '\0', 3.5)


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--commands', type=int, default=500, help='command lines')
    parser.add_argument('--damages', type=int, default=300, help='damages of a run')
    parser.add_argument('--annotations', type=int, default=150, help='COCO files')
    parser.add_argument('--images', type=int, default=60, help='image files')
    parser.add_argument('--seed', type=int, default=0, help='seed of the first case; the next ones count on')


def _flags(parser: argparse.ArgumentParser, draw: random.Random) -> Tuple[List[str], bool]:
    """Draw a few flags with values; also returns whether a numeric flag has an invalid number."""
    actions = [
        a for a in parser._actions if a.option_strings and a.dest not in ('help', 'output', 'experiment', 'device')
    ]
    words, is_nonsense = [], False
    for action in draw.sample(actions, draw.randint(1, 3)):
        words.append(draw.choice(action.option_strings))
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            continue
        count = action.nargs if isinstance(action.nargs, int) else 1
        values = [
            draw.choice(action.choices) if action.choices and draw.random() < 0.7 else draw.choice(VALUES)
            for _ in range(count)
        ]
        is_number = getattr(action.type, '__module__', '').endswith('ranges')
        is_nonsense |= is_number and any(value in NONSENSE for value in values)
        words += values
    return words, is_nonsense


def attack_command(draw: random.Random, scratch: Path, runs: Path) -> bool:
    """Run a random command line; returns whether an invalid number was accepted."""
    kind = draw.choice(['train', 'validate', 'train_detection', 'validate_detection', 'publish'])
    if kind in VALIDATIONS:
        create_parser, validate, run = VALIDATIONS[kind]
        parser = create_parser()
        words, is_nonsense = _flags(parser, draw)
        validate(parse_args(parser, [str(runs / run), '--workers', '0', *words]))
        return is_nonsense
    if kind == 'publish':
        parser = create_publish_parser()
        words, is_nonsense = _flags(parser, draw)
        output = draw.choice([scratch / 'out', runs / 'classifier', Path('/dev/null'), Path('/proc/x'), Path('')])
        publish(parser.parse_args([str(runs / 'classifier'), '--output', str(output), *words]))
        return is_nonsense
    parser, train, recipe = (
        (classification_flags.create_train_parser(), train_module.train, 'digits')
        if kind == 'train'
        else (detection_flags.create_detection_parser(), detection_train.train, 'scenes')
    )
    words, is_nonsense = _flags(parser, draw)
    fixed = ['--workers', '0', '--output', str(scratch), '--dry-run', '--recipe', recipe]
    train(parse_args(parser, [*fixed, *words, '--dry-run']))
    return is_nonsense


def damage(draw: random.Random, run: Path) -> Tuple[str, bool]:
    """Damage one file of a run; returns its name and whether its content must not be used."""
    files = sorted(path for path in run.rglob('*') if path.is_file() and not path.is_symlink())
    path = draw.choice([file for file in files if file.suffix in ('.json', '.safetensors', '.yaml')])
    data = bytearray(path.read_bytes())
    how = draw.choice(['flip', 'cut', 'empty', 'gone', 'folder', 'pipe', 'nested', 'number', 'noise', 'planted'])
    path.unlink()
    if how == 'flip':
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == 'cut':
        del data[draw.randrange(len(data)) :]
    planted = b'dataset: wds/\ndata_dir: "pipe:touch executed #://"\nval_split: "pipe:touch executed"\n'
    contents = {'planted': planted, 'empty': b'', 'nested': b'[' * 100_000, 'number': b'3', 'noise': draw.randbytes(99)}
    if how == 'folder':
        path.mkdir()
    elif how == 'pipe':
        os.mkfifo(path)
    elif how != 'gone':
        path.write_bytes(contents.get(how, bytes(data)))
    return f'{how} {path.relative_to(run)}', path.suffix != '.yaml'


def attack_run(draw: random.Random, scratch: Path, run: Path) -> bool:
    """Validate and resume a damaged run; returns whether a damaged checkpoint was used."""
    copy = scratch / 'run'
    shutil.copytree(run, copy, symlinks=True)
    what, is_checkpoint = damage(draw, copy)
    print(what)
    errors = []
    for call in (
        lambda: validate_module.validate(parse_args(classification_flags.create_validate_parser(), [str(copy)])),
        lambda: train_module.train(_resume(copy, run)),
    ):
        try:
            call()
        except UserError as error:
            errors.append(error)
    is_best = (copy / 'best').resolve().name in what
    if not errors and is_checkpoint and is_best:
        return True
    if errors:
        raise errors[0]
    return False


def _resume(copy: Path, run: Path) -> argparse.Namespace:
    """The arguments that resume a copy of a run."""
    argv = ['--recipe', 'digits', '--output', str(copy.parent), '--experiment', copy.name, '--resume', 'auto']
    args = parse_args(classification_flags.create_train_parser(), argv)
    trained = yaml.safe_load((run / 'args.yaml').read_text())
    return argparse.Namespace(**{**vars(args), **{key: trained[key] for key in ('epochs', 'img_size', 'workers')}})


def attack_annotations(draw: random.Random, scratch: Path, folder: Path) -> bool:
    """Open a COCO file with one value replaced, and read its first samples."""
    content = json.loads((folder / 'annotations' / 'instances_val.json').read_text())
    place: Any = content
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.1:
            break
        place = place[key]
    place[key] = draw.choice(JUNK)
    (scratch / 'changed.json').write_text(json.dumps(content))
    try:
        dataset = CocoDetection(folder / 'val', scratch / 'changed.json')
        for index in range(min(len(dataset), 20)):
            dataset[index]
    except ValueError as error:
        raise UserError(str(error)) from error
    return False


def attack_image(draw: random.Random, scratch: Path, folder: Path) -> bool:
    """Open an image that is truncated, changed or replaced by another file."""
    kind = draw.choice(['PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF'])
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (40, 30, 3), np.uint8)).save(
        buffer, kind
    )
    data = bytearray(buffer.getvalue())
    start, end = draw.choice([(0, 40), (0, len(data)), (40, len(data))])  # the header, anywhere, or what follows it
    for _ in range(draw.choice([1, 2, 20])):
        data[draw.randrange(min(start, len(data) - 1), min(end, len(data)))] = draw.randrange(256)
    if draw.random() < 0.3:
        del data[draw.randrange(len(data)) :]
    (scratch / 'image.jpg').write_bytes(draw.choice([bytes(data), bytes(data), b'%!PS-Adobe-3.0 EPSF-3.0', b'']))
    try:
        open_image(scratch / 'image.jpg', 'RGB')
    except OSError as error:
        raise UserError(str(error)) from error
    return False


def _case(attack: Callable[..., bool], seed: int, target: Path, log: Path) -> None:
    """Run a case, in its own process; write its outcome, one word, and its output to `log`."""
    output, outcome = io.StringIO(), 'accepted'
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(output), redirect_stderr(output):
        os.chdir(scratch)
        (inner := Path(scratch, 'case')).mkdir()
        try:
            outcome = 'accepted in silence' if attack(random.Random(seed), inner, target) else 'accepted'
        except (UserError, SystemExit) as error:
            outcome = 'refused'
            print(error)
        except BaseException:
            outcome = 'traceback'
            traceback.print_exc()
        outcome = 'executed' if list(Path(scratch).rglob('executed')) else outcome
        os.chdir('/')
    log.write_text(f'{outcome}\n{output.getvalue()}')


def small_scenes(folder: Path) -> Path:
    """Write the first two images of each split of digits in scenes; returns their folder."""
    for split in ('train', 'val'):
        content = json.loads((scenes_folder() / 'annotations' / f'instances_{split}.json').read_text())
        content['images'] = content['images'][:2]
        kept = {image['id'] for image in content['images']}
        content['annotations'] = [item for item in content['annotations'] if item['image_id'] in kept]
        for path in ('annotations', split):
            (folder / 'scenes' / path).mkdir(parents=True, exist_ok=True)
        (folder / 'scenes' / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
        for image in content['images']:
            shutil.copy(scenes_folder() / split / image['file_name'], folder / 'scenes' / split)
    return folder / 'scenes'


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Count the outcomes of each kind; list the seeds and last lines of the wrong ones."""
    results: Dict[str, Any] = {}
    context = multiprocessing.get_context('fork')
    torch.set_num_threads(1)  # forking is unsafe with more threads
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    with tempfile.TemporaryDirectory() as scratch:
        runs, scenes, log = Path(scratch), scenes_folder(), Path(scratch, 'log')
        argv = ['--epochs', '2', '--workers', '0', '--device', 'cpu', '--output', scratch]
        argv += ['--recipe', 'digits', '--img-size', '32', '--experiment', 'classifier']
        train_module.train(parse_args(classification_flags.create_train_parser(), argv))
        argv = ['--recipe', 'scenes', '--data-dir', str(small_scenes(runs)), '--epochs', '1', '--warmup-epochs', '0']
        argv += ['--batch-size', '2', '--workers', '0', '--device', 'cpu', '--output', scratch]
        argv += ['--experiment', 'detector']
        detection_train.train(parse_args(detection_flags.create_detection_parser(), argv))
        kinds = {
            'command lines': (attack_command, args.commands, runs),
            'damages of a run': (attack_run, args.damages, runs / 'classifier'),
            'COCO files': (attack_annotations, args.annotations, scenes),
            'images': (attack_image, args.images, scenes),
        }
        for name, (attack, count, target) in kinds.items():
            outcomes, wrong = collections.Counter(), []
            for seed in range(args.seed, args.seed + count):
                log.write_text('hang\n')
                process = context.Process(target=_case, args=(attack, seed, target, log))
                process.start()
                process.join(SECONDS)
                if process.is_alive():
                    process.kill()
                    process.join()
                outcome, *lines = log.read_text().split('\n')
                outcomes[outcome] += 1
                if outcome not in ('accepted', 'refused'):
                    wrong.append(f'{seed} {outcome}: {" / ".join(line for line in lines if line.strip())[-400:]}')
                    print(name, wrong[-1], flush=True)
            results[name] = dict(cases=count, wrong=wrong, **outcomes)
    return results


def render(results: Dict[str, Any]) -> str:
    columns = ('cases', 'refused', 'accepted', 'traceback', 'hang', 'accepted in silence', 'executed')
    rows = [[name, *(found.get(key, 0) for key in columns)] for name, found in results.items()]
    return table(['', *columns], rows)
