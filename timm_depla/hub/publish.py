"""From a run to a repository folder, and with --push to the Hugging Face Hub: `timm-depla publish RUN --output DIR`.

The folder has the weights (safetensors only), config.json (rebuilds the model), recipe.yaml (the training arguments
that differ from the defaults), record.json (the evaluation by this command), checksums.json and the card README.md. If
training kept an average of the weights, both the average and the plain weights are evaluated, and the better ones are
published.
"""

import argparse
import hashlib
import logging
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Tuple

import safetensors.torch
import torch
import yaml
from huggingface_hub import HfApi

import timm_depla
from timm_depla import detection
from timm_depla.commands import run_command
from timm_depla.data import digits_folder
from timm_depla.engine.checkpoint import LINKS, find_damage, read_state
from timm_depla.engine.classification import validate as classification
from timm_depla.engine.classification.flags import create_train_parser, create_validate_parser
from timm_depla.engine.config import parse_args, updated
from timm_depla.engine.run import CHANGE_NOTHING
from timm_depla.errors import ConfigError, as_config_error, require
from timm_depla.files import SUMS, check_own, check_writable, format_json, list_sums, read_key, read_mapping, write_file
from timm_depla.loading import load_model, run_arguments
from timm_depla.models.cost import count_cost

from .card import create_card
from .record import create_record
from .timm_run import adopted

_logger = logging.getLogger(__name__)

ALWAYS = ('batch_size', 'epochs', 'opt', 'sched', 'seed')  # of recipe.yaml, also at their defaults
EDITED = 'README.edited.md'
FILES = ('README.md', 'config.json', 'model.safetensors', 'recipe.yaml', 'record.json', SUMS)
DIGITS = dict(
    id='digits',
    name="scikit-learn's handwritten digits",
    limitations='It knows small grey images of single handwritten digits, 8 x 8 pixels enlarged, and nothing else: it '
    'shows that the block trains, and is no measure of the paper.',
)
SCENES = dict(
    id='digits-in-scenes',
    name='digits in scenes',
    limitations='It knows handwritten digits pasted on textured backgrounds, and nothing else: it shows that the '
    'detector trains, and is no measure of the paper.',
)
FASHION = dict(
    id='fashion_mnist',
    name='Fashion-MNIST',
    split='test',
    limitations='It knows small grey images of single garments on black, 28 x 28 pixels enlarged, and nothing else: it '
    'is no measure of the paper.',
    benchmark="The data set's [list of submitted results](https://github.com/zalandoresearch/fashion-mnist#benchmark), "
    'which its authors have not tested, has 87.6% for two convolutions, 94.9% for a ResNet-18, 95.4% for a DenseNet of '
    '0.77 M parameters and 96.7% for a wide ResNet of 8.9 M.',
)
OTHER = 'It has been measured on this data only. Whoever uses it elsewhere should measure it there first.'


def find_checkpoint(source: str) -> Tuple[Path, Dict[str, Any]]:
    """The folder of a checkpoint, or of a run's best one, and the training arguments; ConfigError if damaged."""
    path = Path(source).resolve()
    folder = path if (path / 'config.json').is_file() else (path / 'best').resolve()
    if not (folder / 'record.json').is_file() or not (folder.parent.parent / 'args.yaml').is_file():
        raise ConfigError(f"'{source}' is no run of train.py or train_detection.py, and no checkpoint of one")
    with as_config_error():
        check_own(folder.parent.parent, LINKS)
    if damage := find_damage(folder):
        raise ConfigError(f"checkpoint '{folder}' is damaged: {damage}")
    trained = run_arguments(str(folder))
    if missing := [key for key in ('epochs', 'eval_metric', 'recipe', 'val_split') if trained.get(key) is None]:
        raise ConfigError(f"'{folder.parent.parent / 'args.yaml'}' is no run's: it has no {', '.join(missing)}")
    return folder, trained


def describe_data(args: Namespace, trained: Dict[str, Any], is_detector: bool) -> Dict[str, Any]:
    """The card's entry on the data set: known for the embedded ones, a ConfigError asks for the name of others."""
    folder, split = Path(trained.get('data_dir') or ''), trained['val_split']
    annotations = folder / 'annotations' / f'instances_{split}.json'
    if args.dataset_name:
        known = dict(id=args.dataset_name.lower().replace(' ', '-'), name=args.dataset_name, limitations=OTHER)
    elif is_detector and read_key(annotations, 'info', 'description') == 'Digits in scenes':
        known = SCENES
    elif not is_detector and folder.resolve() == digits_folder().resolve():
        known = DIGITS
    elif trained.get('dataset') == 'torch/fashion_mnist':
        known = FASHION
    else:
        raise ConfigError('name the data set for the card with --dataset-name, such as "ImageNet-1k"')
    split = re.sub(r'[^\w ./+-]', '_', split)  # which the card would read as Markdown or HTML
    return {'split': split, **known, **({'hub_id': args.dataset_hub_id} if args.dataset_hub_id else {})}


def evaluate(folder: Path, is_detector: bool) -> Dict[str, Any]:
    """Evaluate a run's weights on its validation split, by the code of the validation commands."""
    argv = [str(folder), '--device', 'cuda' if torch.cuda.is_available() else 'cpu']
    if is_detector:
        require('pycocotools', 'detection')
        from timm_depla.engine.detection.flags import create_detection_validate_parser
        from timm_depla.engine.detection.validate import validate

        evaluation = validate(parse_args(create_detection_validate_parser(), argv))
        return {**evaluation.scores, 'images': evaluation.images}
    (metrics,) = classification.validate(parse_args(create_validate_parser(), argv))
    return {key: metrics[key] for key in ('top1', 'top5', 'loss', 'images')}


def candidates(checkpoint: Path, scratch: Path, uses_average: bool) -> Dict[str, Path]:
    """Write folders that can be validated; returns them by the kind of their weights."""
    state = read_state(checkpoint)
    kinds = ['average of the weights', 'weights without averaging'] if uses_average else ['weights']
    if 'state_dict_ema' in state:  # the plain weights were better in training
        kinds.reverse()
    other = state.get('state_dict_ema', state.get('state_dict', {}))
    found = {kind: scratch / kind.split()[0] for kind in kinds[: 1 + bool(other)]}
    for folder in found.values():
        folder.mkdir()
        shutil.copy(checkpoint / 'config.json', folder)
        shutil.copy(checkpoint.parent.parent / 'args.yaml', folder)  # names the data of validation
        shutil.copy(checkpoint / 'model.safetensors', folder)
    if len(found) > 1:
        other = {name: value.contiguous() for name, value in other.items()}
        safetensors.torch.save_file(other, found[kinds[1]] / 'model.safetensors', metadata={'format': 'pt'})
    return found


def describe_model(folder: Path, is_detector: bool) -> Dict[str, Any]:
    """Size and cost of the network."""
    if is_detector:
        model = detection.from_pretrained(folder)
        size = [3, *(32 * math.ceil(side / 32) for side in (max(model.transform.min_size), model.transform.max_size))]
        network, num_classes = model.backbone, len(model.class_names)
    else:
        model = load_model(str(folder))
        size, network, num_classes = list(model.pretrained_cfg['input_size']), model, model.num_classes
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, macs=count_cost(network, size)['macs'], image_size=size, num_classes=num_classes)


def without_folders(value: Any) -> Any:
    """Shorten paths in a value, but for names of classes, to their last part: no folder or user is published."""
    if isinstance(value, str):
        value = re.sub(r'[`\s]+', ' ', value)  # by which a text would leave its place in the card
        flag, equals, path = value.rpartition('=')
        if Path(path).is_absolute() or Path(path).parts[:1] in (('..',), ('~',)):
            return flag + equals + Path(path).name
        value = re.sub(rf'(^|/){re.escape(Path.home().name)}(?=/)', r'\1user', value)
        return re.sub(r"""(?<![\w./:])~?/(?:[^\s/'"]+/)+""", '', value)
    if isinstance(value, dict):
        return {k: v if k in ('label_names', 'class_names') else without_folders(v) for k, v in value.items()}
    return [without_folders(item) for item in value] if isinstance(value, (list, tuple)) else value


def differing(args: Dict[str, Any], is_detector: bool) -> Dict[str, Any]:
    """The arguments of a training that differ from the defaults of its command line, and those of `ALWAYS`."""
    if is_detector:
        require('pycocotools', 'detection')
        from timm_depla.engine.detection.flags import create_detection_parser as create_parser
    else:
        create_parser = create_train_parser
    parser = create_parser()
    left_out = CHANGE_NOTHING | {'device'}
    return {
        key: value
        for key, value in args.items()
        if key not in left_out
        and value not in (None, '', [], {})
        and (key in ALWAYS or value != parser.get_default(key))
    }


def is_edited(folder: Path) -> bool:
    """Whether the card in a folder is another than this command wrote there."""
    if not (folder / 'README.md').is_file():
        return False
    card = hashlib.sha256((folder / 'README.md').read_bytes()).hexdigest()
    return read_key(folder / 'record.json', 'card') != card


def check_output(folder: Path) -> None:
    """Refuse a folder that holds files of anything but this command, or that cannot be written."""
    own = {*FILES, EDITED, *(f'.{name}.part' for name in FILES)}
    with as_config_error(f"cannot write --output '{folder}': ", OSError, ValueError):
        others = sorted(path.name for path in folder.iterdir() if path.name not in own) if folder.is_dir() else []
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output '{folder}' is no folder")
        check_own(folder)
        if others:
            raise ConfigError(f"'{folder}' holds something else ({', '.join(others[:3])}): give another --output")
        if is_edited(folder) and (folder / EDITED).exists():
            raise ConfigError(f"'{folder}' has an edited README.md, and {EDITED}: move one of them elsewhere")
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / SUMS)


def publish(args: Namespace) -> Path:
    """Write the repository folder of a run; returns it.

    ConfigError if the source is no run, its data set has no name, or the folder holds something else.
    """
    output = Path(args.output)
    check_output(output)
    checkpoint, trained = find_checkpoint(args.source)
    config = without_folders(read_mapping(checkpoint / 'config.json'))
    is_detector = detection.is_detector(checkpoint)
    data = describe_data(args, trained, is_detector)
    recipe = without_folders(differing(trained, is_detector))
    metric = trained['eval_metric']
    with tempfile.TemporaryDirectory() as scratch:
        folders = candidates(checkpoint, Path(scratch), trained.get('model_ema', False))
        scores = {name: evaluate(folder, is_detector) for name, folder in folders.items()}
        with as_config_error(f"'{args.source}' has no eval_metric ", KeyError):
            best = (min if metric == 'loss' else max)(scores, key=lambda name: scores[name][metric])
        results = dict(weights=best, **scores[best], **describe_model(folders[best], is_detector))
        results['epochs'] = read_mapping(checkpoint / 'record.json')['epoch']
        if len(scores) > 1:
            results.update(selected_by=metric, candidates={name: score[metric] for name, score in scores.items()})
        task = 'image-classification'
        if is_detector:
            task = 'image-segmentation' if config['architecture'].startswith('mask') else 'object-detection'
        record = create_record(f'timm-depla publish {shlex.join(without_folders(sys.argv[1:]))}', results)
        record.update(task=task, architecture=config['architecture'], recipe=Path(trained['recipe']).stem, dataset=data)
        record, place = without_folders(record), without_folders(str(output))
        source = f'hf-hub:{args.push}' if args.push else place if is_detector else f'local-dir:{place}'
        weights = (folders[best] / 'model.safetensors').read_bytes()
    contents = {'model.safetensors': weights, 'config.json': config, 'recipe.yaml': recipe, 'record.json': record}
    with as_config_error(f"cannot write --output '{output}': ", OSError):
        if is_edited(output):
            os.replace(output / 'README.md', output / EDITED)
            _logger.warning("the edited card is kept as '%s': take over what you wrote", output / EDITED)
        write_folder(output, contents, source, args.licence)
    return output


def write_folder(folder: Path, contents: Dict[str, Any], source: str, licence: str) -> None:
    """Write a repository folder; the record also gets the digest of the card, by which an edited one is known."""
    recipe = yaml.safe_dump(contents['recipe.yaml'], default_flow_style=None, width=120)  # whose order is the card's
    card = str(create_card(contents['record.json'], yaml.safe_load(recipe), source, licence)).encode()
    record = {**contents['record.json'], 'card': hashlib.sha256(card).hexdigest()}
    files = {
        'model.safetensors': contents['model.safetensors'],
        'config.json': f'{format_json(contents["config.json"])}\n'.encode(),
        'recipe.yaml': recipe.encode(),
        'record.json': f'{format_json(record, width=2000)}\n'.encode(),
    }
    write_file(folder / SUMS, list_sums(files))  # first: sums reveal a partial write; the card may be edited
    for name, data in {**files, 'README.md': card}.items():
        write_file(folder / name, data)


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a folder to the Hub in one commit, which also removes pickles; returns its URL. ConfigError if refused."""
    api = HfApi(library_name='timm_depla', library_version=timm_depla.__version__)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(FILES),
            delete_patterns=['*.bin', '*.ckpt', '*.pkl', '*.pt', '*.pth'],
            commit_message=f'Publish {folder.name}',
        )
    except Exception as error:  # networks fail in many ways
        raise ConfigError(f"cannot push to '{repo}': {error}; `hf auth login` logs in") from error
    return commit.commit_url


def create_publish_parser() -> argparse.ArgumentParser:
    """The command line of `timm-depla publish`."""
    parser = argparse.ArgumentParser(description=__doc__.split(':')[0])
    parser.add_argument('source', metavar='RUN', help='a run of train.py or train_detection.py, or a checkpoint of one')
    parser.add_argument('--output', required=True, metavar='DIR', help='folder to write')
    parser.add_argument('--push', default='', metavar='ORG/NAME', help='upload it to this repository of the Hub')
    parser.add_argument('--private', action='store_true', help='as a private repository, if it is new')
    parser.add_argument('--dry-run', action='store_true', help='with --push: list what would be sent')
    parser.add_argument('--dataset-name', default='', metavar='NAME', help='the data set, for the card')
    parser.add_argument('--dataset-hub-id', default='', metavar='ID', help='its id on the Hub, for the card')
    parser.add_argument('--licence', default='apache-2.0', metavar='ID', help="the weights' licence")
    return parser


def main() -> None:
    args = create_publish_parser().parse_args()
    with adopted(args.source) as source:
        folder = publish(updated(args, source=source))
    for name in FILES:
        data = (folder / name).read_bytes()
        print(f'{name:18} {len(data):12,} bytes  sha256 {hashlib.sha256(data).hexdigest()}')
    if args.push and args.dry_run:
        print(f"would be sent to '{args.push}'")
    elif args.push:
        print(push(folder, args.push, args.private))


if __name__ == '__main__':
    run_command('hub.publish', main)
