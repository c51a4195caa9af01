"""Models by timm's registry, with weights from the Hugging Face Hub as safetensors only."""

from typing import Any, Dict, List, Optional, Type

import timm
import torch.nn as nn
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.models import build_model_with_cfg

__all__ = ['build_model', 'list_models']

_FILE = 'model.safetensors'


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
    """
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
