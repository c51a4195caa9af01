"""Trained detectors: folders with config.json, which rebuilds the detector, and model.safetensors."""

import json
import os
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torchvision.models.detection import FasterRCNN

from timm_depla.files import SUMS, find_change, is_unvalidated, read_mapping, read_tensors

from .rcnn import create_detector

__all__ = ['detector_config', 'from_pretrained', 'is_detector']

_LIBRARY = 'timm_depla'
_FILES = ('config.json', 'model.safetensors')
FETCHING = {'cache_dir', 'checkpoint_path', 'weights', 'weights_backbone'}  # arguments that load, as pretrained* do
_KEYS = {'architecture', 'num_classes', 'model_args', 'class_names', 'category_ids'}


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
    return (json.dumps(config, indent=2) + '\n').encode()


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
            try:
                return read_mapping(path).get('library_name') == _LIBRARY
            except ValueError:
                return False
    return False


def _check_args(model_args: Any, source: Any) -> Dict[str, Any]:
    """Return a published detector's arguments, after a check that they load no files.

    Raises:
        ValueError: If an argument would load weights from elsewhere, or the arguments are no mapping.
    """
    if not isinstance(model_args, dict) or not isinstance(model_args.get('backbone_kwargs') or {}, dict):
        raise ValueError(f"'{source}' cannot be read: its model_args are no mapping")
    names = {*model_args, *(model_args.get('backbone_kwargs') or {})}
    if fetching := sorted(name for name in names if name in FETCHING or name.startswith('pretrained')):
        raise ValueError(
            f"'{source}' would load weights from elsewhere by {fetching}: remove that from its config.json"
        )
    return model_args


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
        raise ValueError(
            f"'{source}' has no checkpoint: expected config.json and model.safetensors in it or in its folder best"
            + hint
        )
    if change := find_change(folder, _FILES):
        raise ValueError(f"'{source}' is damaged: {change}")
    try:
        config, weights = read_mapping(folder / 'config.json'), read_tensors(folder / 'model.safetensors')
    except ValueError as error:
        raise ValueError(f"'{source}' cannot be read: {error}") from error
    if config.get('library_name') != _LIBRARY or not config.keys() >= _KEYS:
        raise ValueError(f"'{source}' holds no detector but '{config.get('architecture')}'")
    arguments = {**_check_args(config['model_args'], source), **kwargs}
    try:
        model = create_detector(config['architecture'], num_classes=config['num_classes'], **arguments)
    except (AssertionError, AttributeError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"'{source}' cannot be rebuilt from its config.json: {error!r}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = '; '.join(line.strip() for line in str(error).splitlines()[1:4])
        raise ValueError(f"the weights in '{source}' are of another detector than its config.json: {first}") from error
    model.class_names, model.category_ids = config['class_names'], config['category_ids']
    return model.eval()
