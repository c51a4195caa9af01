"""Models by timm's registry, with weights from the Hugging Face Hub as safetensors only."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Type

import timm
import torch.nn as nn
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg

from timm_depla.files import find_change, read_mapping
from timm_depla.schema import check_classifier

__all__ = ['build_model', 'check_published', 'imagenet_cfg', 'list_models']

_FILE = 'model.safetensors'


def imagenet_cfg(**kwargs) -> Dict[str, Any]:
    """The cfg of a network for ImageNet without published weights."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'license': 'apache-2.0', 'paper_name': 'Aggregation with Feature Detection', **kwargs,
    }  # fmt: skip


def check_published(folder: Path, names: Sequence[str] = ()) -> None:
    """Check a folder with config.json and weights, before a network is built from it.

    Args:
        folder: The folder.
        names: The files whose checksums are checked; all that are listed if empty.

    Raises:
        ValueError: If a file is not the one that checksums.json lists, or config.json has a value that no network has.
    """
    if change := find_change(folder, names):
        raise ValueError(f'is damaged: {change}')
    try:
        check_classifier(read_mapping(folder / 'config.json'), 'config.json')
    except ValueError as error:
        raise ValueError(f'cannot be used: {error}') from error


def build_model(
    model_cls: Type[nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg`, without its fallback to a pickle if the safetensors file is missing.

    Raises:
        RuntimeError: If the repository has no model.safetensors, or it is damaged.
        ValueError: If a local folder does not hold what its checksums.json lists, or its config.json is invalid.
    """
    cfg = kwargs.get('pretrained_cfg')
    if isinstance(cfg, dict) and cfg.get('source') == 'local-dir':
        try:
            check_published(Path(cfg['file']), ('config.json', _FILE))
        except ValueError as error:
            raise ValueError(f"'{cfg['file']}' {error}") from error
    overlay = {'hf_hub_filename': _FILE, **(pretrained_cfg_overlay or {})}
    try:
        return build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    except LocalEntryNotFoundError:  # an outage: its message says so
        raise
    except EntryNotFoundError as error:
        raise RuntimeError(f'the repository has no {_FILE}, and timm_depla loads nothing else: {error}') from error
    except SafetensorError as error:
        raise RuntimeError(
            f'{_FILE} is damaged ({error}): remove it from the cache (`hf cache rm`) or from its folder, and pull again'
        ) from error


def list_models(filter: str = '') -> List[str]:
    """Names of this package's models in timm's registry; `filter` may have wildcards."""
    return [
        name for name in timm.list_models(filter) if timm.model_entrypoint(name).__module__.startswith('timm_depla.')
    ]
