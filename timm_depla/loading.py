"""Models by name, or from runs and checkpoints."""

import json
import socket
import tempfile
from argparse import Namespace
from pathlib import Path
from textwrap import shorten
from typing import Any, Dict, Optional, Sequence
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch.nn as nn
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models._hub import save_config_for_hf

from timm_depla.data import digits_folder
from timm_depla.data.scenes import scenes_folder
from timm_depla.detection import is_detector
from timm_depla.errors import ConfigError, as_config_error, closest, command_for
from timm_depla.files import find_change, format_json, is_unvalidated, read_key, read_mapping
from timm_depla.models import check_published, find_weights, load_backbone
from timm_depla.timm_runs import read_timm_run, with_data_dir

DATA = (
    'dataset', 'data_dir', 'class_map', 'input_key', 'target_key', 'input_img_mode', 'in_chans', 'val_fraction',
)  # arguments that identify the data  # fmt: skip
_EMBEDDED = {'digits': digits_folder, 'digits-in-scenes': scenes_folder}  # by the id in a card's record
_SOURCES = ('hf-hub:', 'hf_hub:', 'local-dir:')  # timm's prefixes of a model's name


def model_config(model: nn.Module, model_args: Dict[str, Any], label_names: Sequence[str] = ()) -> bytes:
    """timm's config.json, which rebuilds the model beside its weights.

    Args:
        model: The model, with the `pretrained_cfg` of its own training.
        model_args: Arguments that rebuild the model, beside its name.
        label_names: Names of the classes, in order.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / 'config.json'
        labels = dict(label_names=list(label_names)) if label_names else None
        save_config_for_hf(model, path, model_config=labels, model_args=model_args)
        config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)  # a top-level key already; transformers wants it only there
    return f'{format_json(config)}\n'.encode()


def create_model(name: str, **kwargs) -> nn.Module:
    """`timm.create_model`, with its errors as ConfigError.

    Raises:
        ConfigError: If there is no such model, it has no pretrained weights, or it does not take an argument.
    """
    if not name.startswith(_SOURCES) and not timm.is_model(name):
        raise ConfigError(f"no model '{name}'{closest(name, timm.list_models())}")
    if kwargs.get('pretrained') and not name.startswith('local-dir:'):
        look_offline()
    elsewhere = kwargs.keys() & {'backbone', 'pretrained_cfg_overlay'}  # the source of the weights
    if kwargs.get('pretrained') and timm.is_model(name) and not elsewhere:
        check_pretrained(name)
    try:
        return timm.create_model(name, **kwargs)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        raise ConfigError(f"cannot create model '{name}': {_cause(error)}") from error


def look_offline() -> None:
    """Let the Hub's client look in its cache alone where it cannot connect: it would try for a minute."""
    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _cause(error: Exception) -> str:
    """What an error of loading says."""
    if not isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return shorten(str(error), 500, placeholder=' ...') or type(error).__name__
    return f'{constants.ENDPOINT} cannot be reached, and its cache lacks the weights: connect, or give a file'


def check_pretrained(name: str) -> None:
    """Refuse a name of timm without published weights; name those of its network, or of that without DEPLA."""
    base, _, tag = name.partition('.')
    tags = [other for other in timm.list_models(f'{base}.*', pretrained=True) if other.partition('.')[0] == base]
    if name in tags or (tags and not tag):
        return
    plain = base.partition('_depla')[0]
    if tags:
        hint = f'there are {", ".join(tags[:5])}'
    elif plain != base and timm.list_models(f'{plain}.*', pretrained=True):
        hint = f'start from those of the network without DEPLA, --initial-checkpoint {plain}'
    else:
        hint = 'leave out --pretrained'
    raise ConfigError(f"no weights are published for '{name}': {hint}")


def pretrained_file(args: Namespace) -> Dict[str, Any]:
    """Entries of a pretrained cfg for the weights in `args.pretrained_path`, file or folder; ConfigError if none."""
    path = Path(args.pretrained_path)
    with as_config_error('--pretrained-path: ', FileNotFoundError):
        path = find_weights(path) if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--pretrained-path: no file '{path}'")
    return dict(file=str(path), num_classes=-1)


def load_model(target: str, model_name: str = '', **kwargs) -> nn.Module:
    """Load a trained model from a run (its best checkpoint), a checkpoint's folder, a weights file, or timm by name.

    Args:
        target: A run folder, a checkpoint (ours or timm's), a file of weights, or a model with pretrained weights.
        model_name: The architecture of a weights file.
        **kwargs: Model arguments.

    Raises:
        ConfigError: If nothing is there, or it does not fit the architecture.
    """
    path = Path(target.removeprefix('local-dir:'))
    if path.is_file() and not model_name and (path.parent / 'config.json').is_file():
        path = path.parent
    if not model_name and (found := read_timm_run(str(path))):
        model = create_model(found.name, **{**found.model_args, **kwargs})
        load_weights(model, str(found.file))
        found.configure(model)
        return model
    if path.is_dir():
        folder = path if (path / 'config.json').is_file() else path / 'best'
        if not (folder / 'model.safetensors').is_file():
            hint = f'; it has not been validated yet, {target}/last is its last one' if is_unvalidated(path) else ''
            raise ConfigError(
                f"'{target}' has no checkpoint: expected model.safetensors in it or in its folder best{hint}"
            )
        if is_detector(folder):
            raise ConfigError(f"'{target}' holds a detector: {command_for('validate_detection.py')} validates it")
        with as_config_error(f"'{target}' "):
            check_published(folder)
        return create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
    if path.is_file():
        if not model_name:
            raise ConfigError(f"'{target}' holds weights only: name the architecture with --model")
        model = create_model(model_name, **kwargs)
        load_weights(model, target)
        return model
    if timm.is_model(target) or target.startswith(_SOURCES):
        return create_model(target, pretrained=True, **kwargs)
    raise ConfigError(f"'{target}' is no run folder, checkpoint or model{closest(target, timm.list_models())}")


def load_weights(model: nn.Module, path: str, heads: Optional[Sequence[str]] = None) -> str:
    """Load weights, of the model itself or of its backbone, and return what was loaded as a sentence.

    Args:
        model: The model.
        path: A file, the folder of a run, a checkpoint or published weights, or a model of timm.
        heads: The modules that may have another number of classes; the classifier by default.

    Raises:
        ConfigError: If the file is missing, damaged, no checkpoint, or one of another architecture.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    for place in (folder, folder / 'best') if Path(path).is_dir() else (folder,):
        if change := find_change(place, ['model.safetensors']):
            raise ConfigError(f"'{path}' is damaged: {change}")
    if not Path(path).exists():
        look_offline()
    try:
        return str(load_backbone(model, path, heads))
    except Exception as error:  # a file that is no checkpoint can make the unpickler raise anything
        raise ConfigError(f"cannot load '{path}': {_cause(error)}") from error


def run_arguments(target: str) -> Dict[str, Any]:
    """The arguments of the run that a run folder, checkpoint or weights file belongs to; empty for other targets.

    ConfigError if its args.yaml cannot be read, or has a value that no flag takes.
    """
    file = _arguments_file(target)
    if not file.is_file():
        found = read_timm_run(target)
        return found.args if found else {}
    with as_config_error():
        return with_data_dir(read_mapping(file), file)


def _arguments_file(target: str) -> Path:
    path = Path(target.removeprefix('local-dir:')).resolve()
    folder = path.parent if path.is_file() else path
    return (folder.parent.parent if folder.parent.name == 'checkpoints' else folder) / 'args.yaml'


def resumed_recipe(args: Namespace) -> Optional[str]:
    """The args.yaml of the run that `--resume` names: a recipe with all that the command line need not repeat.

    ConfigError if it names data that is not local, and so could come from anywhere.
    """
    target = str(Path(args.output, args.experiment)) if args.resume == 'auto' and args.experiment else args.resume
    found = run_arguments(target) if target and target != 'auto' else {}
    if not found:
        return None
    if not getattr(args, 'dataset', ''):  # else the command line says what is read
        trained_data(target, args.data_dir)
    return str(_arguments_file(target))


def trained_data(target: str, data_dir: Optional[str] = None) -> Dict[str, str]:
    """The data of the target's run, or the embedded data that a published folder was trained on, as arguments.

    A run can come from an untrusted source, so its data must be a local folder: nothing is downloaded. `data_dir` is
    read instead of the run's. ConfigError if the target's data is unknown, or no local folder.
    """
    found = run_arguments(target)
    found = {key: found[key] for key in DATA if found.get(key)}
    record = Path(target.removeprefix('local-dir:'), 'record.json')
    if not found and (embedded := _EMBEDDED.get(str(read_key(record, 'dataset', 'id')))):
        return {'data_dir': str(embedded())}
    if not found:
        raise ConfigError(f"'{target}' is no run folder, so its data is unknown: check the path, or give --data-dir")
    kind, folder = found.get('dataset', ''), data_dir or found.get('data_dir', '')
    if kind.partition('/')[0].lower() not in ('', 'torch', 'wds') or not Path(folder).is_dir():
        raise ConfigError(
            f"'{target}' was trained on '{f'{kind} {folder}'.strip()}', which is no folder here: name the data with "
            '--data-dir and --dataset'
        )
    return found
