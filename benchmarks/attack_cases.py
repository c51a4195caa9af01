"""The cases of the benchmark `attack`: what each draws from a seed, and the command that it then runs.

Each returns whether a number or a damage was accepted in silence; a command that ends with a message raises SystemExit.
`home` and `outside` beside a case's folder are what a link may lead to.
"""

import argparse
import io
import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import timm
import yaml
from PIL import Image

from timm_depla.commands import main
from timm_depla.detection.coco import CocoDetection
from timm_depla.engine.classification.flags import create_train_parser, create_validate_parser
from timm_depla.engine.detection.flags import create_detection_parser, create_detection_validate_parser
from timm_depla.errors import UserError
from timm_depla.files import SUMS, list_sums, open_image
from timm_depla.hub.publish import create_publish_parser
from timm_depla.schema import Kind

NONSENSE = ('nan', 'inf', '-inf', '1e999', 'x', '--')
VALUES = (
    *NONSENSE, '-7', '9' * 40, '0', '1', '2', '0.5', '3', '64', '', ' ', 'None', '[]', "{'a': 1}", '../x', 'cpu',
    'resnet18', 'wds/', 'pipe:touch executed', '$(touch executed)', '/nonexistent', 'x' * 5000, 'a\n\x1b[31mb',
)  # fmt: skip
JUNK = (None, True, -1, 0, 2**70, 1e308, 1e-300, math.nan, '', 'x', '../x', [], {}, [[]], [1, 2, 3], {'a': 1}, '\0',
        3.5, 10**9, [0.5] * 3, 'evil/x', 'http://evil.example/x.pth', 'x' * 10**6)  # fmt: skip
EXTREMES = ('1e308', '1e300', '-1e308', '1e-300', '1e9', '1e-9', '0', '1', '0.999999', '2147483647', '-0.0', '5e-324')
FETCHING = {
    'dataset': ('torch/cifar10', 'hfds/evil/data', 'hfids/evil/data', 'wds/', 'tfds/mnist'),
    'dataset_download': (True,),
    'dataset_trust_remote_code': (True,),
    'data_dir': ('https://evil.example/x.tar', 'pipe:touch executed', '/etc', '../outside'),
    'kd_model_name': ('resnet18', 'hf-hub:evil/x', '../outside'),
    'model': ('hf-hub:evil/x', 'local-dir:../outside', 'resnet18', 'backbone_depla'),
    'model_kwargs': ({'pretrained': True}, {'checkpoint_path': '../outside/victim'}, {'depla': {'temperature': 0}}),
    'pretrained': (True,),
    'pretrained_path': ('../outside/victim',),
    'initial_checkpoint': ('resnet18', '../outside/victim'),
    'log_wandb': (True,),
    'log_tensorboard': (True,),
    'output': ('../outside', '/proc/x'),
    'experiment': ('../outside', 'x' * 5000),
    'results_file': ('../outside/x',),
    'help': (True,),
    'opt': ('x', '__import__'),
    'epochs': (math.nan, '1e400', 10**10),
}
TEXTS = (
    'a: &a [x, x, x, x, x, x, x, x, x]\n'
    + ''.join(f'{b}: &{b} [{", ".join(["*" + a] * 9)}]\n' for a, b in zip('abcdefgh', 'bcdefghi', strict=True)),
    '[' * 100_000, 'x: ' + '{a: ' * 50, '!!python/object/apply:os.system ["touch executed"]', 'recipe: !!binary x',
    'epochs: 1:2:3', 'x: ' + 'y' * 2_000_000, '\ufeffepochs: 2', '<<: {epochs: 2}', 'epochs: 2\nepochs: 3',
    '? [a]\n: b', 'epochs: 2026-11-28', '%YAML 9.9\n---\nx: 1', '--- 1\n--- 2', '\t', 'null: 1', '1: 2',
    'recipe: [digits]',
)  # fmt: skip


PARSERS = {
    'train': create_train_parser,
    'validate': create_validate_parser,
    'train-detection': create_detection_parser,
    'validate-detection': create_detection_validate_parser,
    'publish': create_publish_parser,
}


def call(verb: str, *argv: Any) -> None:
    """Run `timm-depla VERB ...`; SystemExit with its message, if it ends with one."""
    try:
        main([verb, *map(str, argv)])
    except SystemExit as end:
        if end.code != 0:
            raise


def _flags(parser: argparse.ArgumentParser, draw: random.Random) -> Tuple[List[str], bool]:
    """Draw a few flags with values; also returns whether a numeric flag has an invalid number."""
    left_out = ('help', 'output', 'experiment', 'results_file', 'device')  # of these, three write where they say
    actions = [action for action in parser._actions if action.option_strings and action.dest not in left_out]
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
        is_nonsense |= isinstance(action.type, Kind) and any(value in NONSENSE for value in values)
        words += values
    return words, is_nonsense


def attack_command(draw: random.Random, scratch: Path, runs: Path) -> Optional[bool]:
    """A random command line."""
    name = draw.choice(list(PARSERS))
    words, is_nonsense = _flags(PARSERS[name](), draw)
    outputs = [scratch / 'out', runs / 'classifier', Path('/dev/null'), Path('/proc/x'), Path('')]
    dry = ['--workers', 0, *words, '--output', scratch, '--dry-run']
    argv = {
        'train': ['--recipe', 'digits', *dry],
        'validate': [runs / 'classifier', '--workers', 0, *words],
        'train-detection': ['--recipe', 'scenes', *dry],
        'validate-detection': [runs / 'detector', '--workers', 0, *words],
        'publish': [runs / 'classifier', '--output', draw.choice(outputs), *words],
    }
    call(name, *argv[name])
    return is_nonsense


def _copy(run: Path, scratch: Path) -> Path:
    return Path(shutil.copytree(run, scratch / 'run', symlinks=True))


def _damage(draw: random.Random, run: Path) -> str:
    """Damage one file of a run; returns how, and its name."""
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
    return f'{how} {path.relative_to(run)}'


def _resume(run: Path) -> List[Any]:
    return ['--resume', run, '--epochs', 2]


def _try_each(*commands: List[Any]) -> None:
    """Do what all commands do; raises the first message, one that tells an unexpected error before the others."""
    messages = []
    for name, *argv in commands:
        try:
            call(name, *argv, *([] if name == 'publish' else ['--workers', 0]))
        except SystemExit as message:
            messages.append(message)
    if messages:
        raise max(messages, key=lambda message: ': unexpected ' in str(message))


def attack_run(draw: random.Random, scratch: Path, run: Path) -> Optional[bool]:
    """A damaged run, validated and resumed; returns whether a damaged checkpoint was used."""
    run = _copy(run, scratch)
    what = _damage(draw, run)
    print(what)
    _try_each(['validate', run], ['train', *_resume(run)])
    return not what.endswith('.yaml') and (run / 'best').resolve().name in what


def attack_links(draw: random.Random, scratch: Path, run: Path) -> Optional[bool]:
    """A run or a published folder with a link, a second name, a pipe or a device where a file or folder of ours is."""
    run, home = _copy(run, scratch), Path('home').resolve()
    names = ['args.yaml', 'summary.csv', 'log.txt', 'curves.png', 'diverged.json', 'best', 'last']
    names = [*names, *(f'.{name}.part' for name in names), '.lock', '.holder', '.holder.part', 'tensorboard', 'wandb']
    names += ['checkpoints', 'checkpoints/0001-000000', 'checkpoints/.0003-000000.part', 'checkpoints/0009-000000']
    names += ['checkpoints/0001-000000/model.safetensors', 'checkpoints/0001-000000/checksums.json']
    path = run / draw.choice(names)
    is_publishing = draw.random() < 0.3
    if is_publishing:
        (scratch / 'out').mkdir()
        names = [name for file in ('README.md', 'config.json', SUMS) for name in (file, f'.{file}.part')]
        path = scratch / 'out' / draw.choice(names)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    targets = [home / '.bashrc', '../home/.bashrc', home, '../../outside', '/dev/zero', path.name, 'nowhere', '/etc']
    how = draw.choice(['link', 'link', 'link', 'name', 'pipe', 'device'])
    if how == 'link':
        path.symlink_to(draw.choice(targets))
    elif how == 'name':
        os.link(home / '.bashrc', path)
    elif how == 'pipe':
        os.mkfifo(path)
    else:
        os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero
    print(how, path)
    if is_publishing:
        call('publish', run, '--output', scratch / 'out')
    else:
        _try_each(['train', *_resume(run), '--resume-with-changes'], ['validate', run])


def attack_config(draw: random.Random, scratch: Path, runs: Path) -> Optional[bool]:
    """A folder of weights whose config.json has other values, and sums that fit."""
    kind = draw.choice(['classifier', 'detector'])
    folder = scratch / 'published'
    shutil.copytree((runs / kind / 'best').resolve(), folder)
    config = json.loads((folder / 'config.json').read_text())
    places = [config, config.get('pretrained_cfg') or config['model_args'], config['model_args']]
    place = draw.choice(places)
    more = ['pretrained', 'checkpoint_path', 'temperature', 'depla', 'crop_pct', 'test_input_size', 'url', 'layers',
            'hf_hub_id', 'pretrained_cfg_overlay', 'box_score_thresh', 'image_std', 'backbone_kwargs']  # fmt: skip
    place[draw.choice([*place, draw.choice(more)])] = draw.choice(JUNK)
    (folder / 'config.json').write_text(json.dumps(config))
    files = [path for path in folder.iterdir() if path.name != SUMS]
    (folder / SUMS).write_bytes(list_sums({path.name: path.read_bytes() for path in files}))
    print({key: value for key, value in place.items() if not isinstance(value, str) or len(value) < 100})
    if kind == 'detector':
        call('validate-detection', folder, '--data-dir', runs / 'scenes', '--workers', 0)
    elif draw.random() < 0.5:
        call('validate', folder, '--data-dir', runs / 'few', '--workers', 0)
    else:
        try:
            model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise SystemExit(str(error)) from error  # a caller's, with whatever words timm has
        return not all(value.isfinite().all() for value in model.state_dict().values())


def attack_yaml(draw: random.Random, scratch: Path, runs: Path) -> Optional[bool]:
    """A run whose args.yaml asks for something that is not its own to ask for, or is no plain YAML."""
    run = _copy(runs / 'classifier', scratch)
    arguments = yaml.safe_load((run / 'args.yaml').read_text())
    for key in draw.sample(sorted(FETCHING), draw.choice([1, 1, 2, 3])):
        arguments[key] = draw.choice(FETCHING[key])
    text = yaml.safe_dump(arguments)
    if draw.random() < 0.4:
        text = draw.choice(['', text]) + draw.choice(TEXTS)
    print(text if len(text) < 5000 else text[:200])
    (run / 'args.yaml').write_text(text)
    for file in ('checksums.json', 'record.json'):
        if draw.random() < 0.05:
            (run / 'best' / file).unlink()
    commands = [
        ['train', *_resume(run)],
        ['validate', run],
        ['publish', run, '--output', scratch / 'out'],
        ['train', '--recipe', run / 'args.yaml', '--output', scratch, '--dry-run'],
    ]
    _try_each(*draw.sample(commands, 2))


def attack_model(draw: random.Random, scratch: Path, runs: Path) -> Optional[bool]:
    """A network with arguments or a backbone that do not fit."""
    names = ['depla', 'layers', 'block', 'stem_width', 'channels', 'pretrained', 'num_classes', 'drop_rate', 'device',
             'name', 'features_only', 'pretrained_cfg_overlay', 'act_layer', 'norm_layer', 'base_width', 'out_channels',
             'typo', 'anchor_sizes', 'min_size', 'box_score_thresh', 'backbone_kwargs', 'image_mean']  # fmt: skip
    depla = ['temperature', 'num_groups', 'pooled_chs', 'maps_per_group', 'bfn', 'stage', 'positions', 'modules']

    def word(name: str) -> str:
        value = {draw.choice(depla): draw.choice(JUNK)} if name == 'depla' else draw.choice(JUNK)
        return f'{name}={value!r}'

    model = draw.choice(['test_resnet_depla', 'test_fishnet_depla', 'backbone_depla', 'backbone_depla', 'detector'])
    words = [word(name) for name in draw.sample(names, draw.choice([0, 1, 1, 2]))]
    if model == 'backbone_depla':
        names = [name for name in timm.list_models('test_*') if 'depla' not in name]
        name = draw.choice([*names, 'vgg11', 'alexnet', 'vit_tiny_patch16_224', 5, None, '', '../x', 'hf-hub:evil/x'])
        words += [f'backbone={name!r}', *draw.choice([[], [], ['depla={"modules": []}'], ['depla={"modules": ["x"]}']])]
    kwargs = ['--model-kwargs', *words] if words else []
    print(model, [text[:100] for text in words])
    if model == 'detector':
        shown = ['--model', 'fasterrcnn_test_resnet_depla_fpn_depla', '--dry-run', '--output', scratch]
        call('train-detection', runs / 'scenes', '--recipe', 'scenes', *shown, '--workers', 0, *kwargs)
    else:
        shown = ['--img-size', 64, '--dry-run', '--output', scratch, '--workers', 0]
        call('train', runs / 'few', '--recipe', 'digits', '--model', model, *shown, *kwargs)


def attack_number(draw: random.Random, scratch: Path, runs: Path) -> Optional[bool]:
    """A short training with an extreme number."""
    parser = create_train_parser()
    left_out = ('workers', 'img_size', 'input_size', 'stop_epoch', 'in_chans')  # which a machine bounds, or this case
    actions = [a for a in parser._actions if isinstance(a.type, Kind) and a.dest not in left_out]
    words: List[Any] = []
    for action in draw.sample(actions, draw.choice([1, 1, 2])):
        count = action.nargs if isinstance(action.nargs, int) else 1
        words += [action.option_strings[-1], *(draw.choice(EXTREMES) for _ in range(count))]
    print(words)
    more = draw.choice([[], ['--model-ema'], ['--mixup', 0.2], ['--opt', 'adamw', '--layer-decay', 0.5]])
    base = '--recipe digits --img-size 32 --workers 0 --epochs 2 --stop-epoch 1 --warmup-epochs 0 --batch-size 10'
    call('train', runs / 'few', *base.split(), '--output', scratch, *more, *words)


def attack_annotations(draw: random.Random, scratch: Path, folder: Path) -> Optional[bool]:
    """A COCO file with one value replaced; its first samples are read."""
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


def attack_image(draw: random.Random, scratch: Path, _: Path) -> Optional[bool]:
    """An image that is truncated, changed or replaced by another file."""
    kind = draw.choice(['PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF'])
    buffer = io.BytesIO()
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
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


CASES: Dict[str, Tuple[Callable[..., Optional[bool]], str, int]] = {
    'command lines': (attack_command, '', 500),
    'damages of a run': (attack_run, 'classifier', 300),
    'links, pipes, devices': (attack_links, 'classifier', 50),
    'config.json': (attack_config, '', 200),
    'args.yaml': (attack_yaml, '', 100),
    'arguments and hosts': (attack_model, '', 150),
    'extreme numbers': (attack_number, '', 100),
    'COCO files': (attack_annotations, 'scenes', 150),
    'images': (attack_image, '', 60),
}
"""By name: the attack, the folder of the runs that it gets, and the number of cases by default."""
