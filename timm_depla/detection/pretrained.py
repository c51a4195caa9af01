"""Trained detectors: folders with config.json, which rebuilds the detector, and model.safetensors."""

import os
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torchvision.models.detection import FasterRCNN

from timm_depla.files import SUMS, find_change, format_json, is_unvalidated, read_key, read_mapping, read_tensors
from timm_depla.schema import DETECTOR, NAMES, TEXT, Kind, check, check_arguments, is_integer, shorten

from .rcnn import create_detector

__all__ = ['detector_config', 'from_pretrained', 'is_detector']

_LIBRARY = 'timm_depla'
_FILES = ('config.json', 'model.safetensors')
_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError)
_KEYS = {
    'architecture': TEXT,
    'num_classes': DETECTOR['num_classes'],
    'model_args': Kind('a map of names to values', lambda value: isinstance(value, dict)),
    'class_names': NAMES,
    'category_ids': Kind(
        'a list of different whole numbers',
        lambda value: isinstance(value, list) and all(map(is_integer, value)) and len(set(value)) == len(value),
    ),
}


def detector_config(
    name: str, class_names: Sequence[str], category_ids: Sequence[int], model_args: Optional[Dict[str, Any]] = None
) -> bytes:
    """The config.json of a detector.

    Args:
        name: Its name for `create_detector`.
        class_names: Names of the labels from 1 on.
        category_ids: Their COCO category ids.
        model_args: Further arguments of `create_detector`, of JSON types.
    """
    config = dict(library_name=_LIBRARY, architecture=name, num_classes=len(class_names) + 1)
    config.update(model_args=model_args or {}, class_names=list(class_names), category_ids=list(category_ids))
    return f'{format_json(config)}\n'.encode()


def _pull(source: str) -> Path:
    """Download a Hub repository's config, weights and checksums, but no pickles; return the cached folder."""
    repository, _, revision = source.removeprefix('hf-hub:').partition('@')
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*_FILES, SUMS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"cannot pull '{source}': {error}") from error


def is_detector(folder: os.PathLike) -> bool:
    """Whether a run folder (its best checkpoint) or a checkpoint folder holds a detector of this package."""
    for path in (Path(folder, 'config.json'), Path(folder, 'best', 'config.json')):
        if path.is_file():
            return read_key(path, 'library_name') == _LIBRARY
    return False


def _check_config(config: Dict[str, Any], place: str) -> None:
    """Raise ValueError if a value is not of its kind, an argument would load weights, or a class lacks a name."""
    check(config, _KEYS, place)
    check_arguments(config['model_args'], f'{place}, model_args')
    number = config['num_classes']
    for key in ('class_names', 'category_ids'):
        if (count := len(config[key])) != number - 1:
            raise ValueError(f'{place}: {key} has {count} entries for {number} classes with background')


def from_pretrained(source: os.PathLike, **kwargs) -> FasterRCNN:
    """Load a trained detector, for inference.

    Example:
        model = from_pretrained('output/RUN', box_score_thresh=0.5)
        detections = model([image])  # image (3, H, W) from 0 to 1

    Args:
        source: A run folder (its best checkpoint), a checkpoint folder, or 'hf-hub:ORG/NAME' on the Hugging Face Hub,
            with '@REVISION' if not the newest.
        **kwargs: Arguments of `create_detector` that override those of training.

    Returns:
        The detector, in evaluation mode; its attributes `class_names` and `category_ids` are in the order of the
        labels, from label 1 on.

    Raises:
        ValueError: If the folder has no detector, or its weights are not those of its configuration.
    """
    folder = _pull(str(source)) if str(source).startswith('hf-hub:') else Path(source)
    if not (folder / 'config.json').is_file():
        folder = folder / 'best'
    if not ((folder / 'config.json').is_file() and (folder / 'model.safetensors').is_file()):
        hint = f'; it has not been validated yet, {source}/last is its last one' if is_unvalidated(Path(source)) else ''
        files = 'config.json and model.safetensors in it or in its folder best'
        raise ValueError(f"'{source}' has no checkpoint: expected {files}{hint}")
    if change := find_change(folder, _FILES):
        raise ValueError(f"'{source}' is damaged: {change}")
    try:
        config, weights = read_mapping(folder / 'config.json'), read_tensors(folder / 'model.safetensors')
    except ValueError as error:
        raise ValueError(f"'{source}' cannot be read: {error}") from error
    if config.get('library_name') != _LIBRARY:
        raise ValueError(f"'{source}' holds no detector but {shorten(config.get('architecture'))}")
    _check_config(config, f"'{source}', config.json")
    own = dict(name=config['architecture'], num_classes=config['num_classes'])
    found = f'its config.json with {sorted(kwargs)}' if kwargs else 'its config.json'
    try:
        model = create_detector(**{**config['model_args'], **own, **kwargs})
    except _ERRORS as error:
        raise ValueError(f"'{source}' cannot be rebuilt from {found}: {error!r}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = '; '.join(line.strip() for line in str(error).splitlines()[1:4])
        raise ValueError(f"the weights in '{source}' are of another detector than {found}: {first}") from error
    model.class_names, model.category_ids = config['class_names'], config['category_ids']
    return model.eval()
