"""Load the weights of a plain network into the DEPLA model that is built on it."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Union

import timm
import torch
import torch.nn as nn
from timm.models import clean_state_dict, is_model, load_state_dict

from timm_depla.layers import Depla

from .insertion import BlockWithDepla

__all__ = ['LoadReport', 'find_weights', 'load_backbone']

Source = Union[str, os.PathLike, nn.Module, Dict[str, torch.Tensor]]
_COUNTER = '.num_batches_tracked'  # a frozen BatchNorm lacks it, and nothing reads it


@dataclass
class LoadReport:
    """Result of `load_backbone`, as names of tensors in the model's state dict.

    Attributes:
        loaded: Tensors taken from the source.
        new: Tensors of DEPLA that the source lacks; they keep their initial values.
        skipped: Tensors of the heads, if the source was trained for another number of classes.
    """

    loaded: List[str]
    new: List[str]
    skipped: List[str]

    def __str__(self) -> str:
        text = f'{len(self.loaded)} tensors loaded, {len(self.new)} of DEPLA new'
        return text + (f', head left as it was ({", ".join(self.skipped)})' if self.skipped else '')


def load_backbone(model: nn.Module, source: Source, heads: Optional[Sequence[str]] = None) -> LoadReport:
    """Load the weights of the original network, or of the whole DEPLA model, and report what was and was not loaded.

    Example:
        model = timm.create_model('resnet50_depla', num_classes=10)
        print(load_backbone(model, 'resnet50.a1_in1k'))

    Args:
        model: A DEPLA model of this package.
        source: A network, a state dict, a timm model with pretrained weights (pulled from the Hugging Face Hub), a
            checkpoint file that timm can read (safetensors or PyTorch), or the folder of a run (its best checkpoint),
            of a checkpoint or of published weights.
        heads: Modules that keep their initial weights if the source's have other shapes; the classifier by default.

    Raises:
        FileNotFoundError: If the source is neither a timm model nor a file, or a folder without weights.
        ValueError: If the source does not fit: tensors are missing, unknown or of another shape. The model is left as
            it was.
    """
    state = _read(source, model)
    own = model.state_dict()
    prefixes = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, Depla))
    if heads is None:
        classifier = getattr(model, 'get_classifier', lambda: None)()
        heads = [name for name, module in model.named_modules() if module is classifier]
    heads = tuple(f'{name}.' for name in heads)
    skipped = [k for k in state if k.startswith(heads) and (k not in own or state[k].shape != own[k].shape)]
    state = {k: v for k, v in state.items() if k not in skipped}

    new = [k for k in own if k.startswith(prefixes) and k not in state]
    missing = [k for k in own if k not in state and k not in new and k not in skipped and not k.endswith(_COUNTER)]
    unexpected = [k for k in state if k not in own and not k.endswith(_COUNTER)]
    shapes = {k: (tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own}
    mismatched = [f'{k} {theirs} for {ours}' for k, (theirs, ours) in shapes.items() if theirs != ours]
    if missing or unexpected or mismatched:
        lists = dict(missing=missing, unexpected=unexpected) | {'of another shape': mismatched}
        raise ValueError(
            'these weights are of another architecture or configuration than the model: '
            f'{"; ".join(_some(label, names) for label, names in lists.items())}. '
            'Create the model that they belong to, with the same in_chans and depla arguments'
        )
    model.load_state_dict(state, strict=False)
    return LoadReport(loaded=[k for k in state if k in own], new=new, skipped=skipped)


def find_weights(folder: Path) -> Path:
    """The weights of a run folder (its best checkpoint), a checkpoint or a published folder.

    Raises:
        FileNotFoundError: If there are none.
    """
    for file in (folder / 'model.safetensors', folder / 'best' / 'model.safetensors'):
        if file.is_file():
            return file
    raise FileNotFoundError(f"'{folder}' has no model.safetensors, in it or in its folder best")


def _read(source: Source, model: nn.Module) -> Dict[str, torch.Tensor]:
    """Read the source's state dict, with names translated by the model's `checkpoint_filter_fn`, if any."""
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        source = find_weights(Path(source))
    if isinstance(source, dict):
        state = clean_state_dict(source.get('state_dict', source))
    elif os.path.isfile(source):
        try:
            state = load_state_dict(os.fspath(source))
        except Exception as error:  # if it is no checkpoint, the unpickler can raise anything
            raise ValueError(f'it cannot be read as a checkpoint ({type(error).__name__}: {error})') from error
    elif is_model(str(source)):
        state = timm.create_model(source, pretrained=True, in_chans=model.in_chans).state_dict()
    else:
        raise FileNotFoundError(f"'{source}' is neither a checkpoint file nor a model of timm")
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError('it holds something else than the tensors of a model')
    state = _rename_blocks(state, model)
    filter_fn = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)  # timm's convention
    return filter_fn(state, model) if filter_fn else state


def _rename_blocks(state: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename a plain network's tensors to their names under `BlockWithDepla`; keep names that fit already."""
    for prefix in (f'{name}.' for name, module in model.named_modules() if isinstance(module, BlockWithDepla)):
        if not any(key.startswith(f'{prefix}depla.') for key in state):
            state = {k.replace(prefix, f'{prefix}block.', 1) if k.startswith(prefix) else k: state[k] for k in state}
    return state


def _some(label: str, names: List[str]) -> str:
    """Name the first few of a list, and how many there are."""
    return f'{len(names)} {label}' + (f' ({", ".join(names[:4])}{", ..." if len(names) > 4 else ""})' if names else '')
