"""Files of a training's state without pickles: tensors as safetensors, the rest as JSON."""

import json
from pathlib import Path
from typing import Any, Dict

import safetensors.torch
import torch

from timm_depla.files import read_mapping, read_tensors

__all__ = ['FILES', 'pack_state', 'read_state']

FILES = ('state.json', 'state.safetensors')


def pack_state(state: Dict[str, Any]) -> Dict[str, bytes]:
    """Encode a state of dictionaries, lists, tuples, tensors, numbers, strings and None as files."""
    tensors: Dict[str, torch.Tensor] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.contiguous()
            return {'tensor': str(len(tensors) - 1)}
        if isinstance(value, dict):  # JSON keys are only strings
            return {'dict': [[encode(key), encode(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [encode(item) for item in value]}
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise TypeError(f'no state of type {type(value).__name__}: {value!r}')
        return value

    text = json.dumps(encode(state)) + '\n'
    return dict(zip(FILES, (text.encode(), safetensors.torch.save(tensors)), strict=True))


def read_state(folder: Path) -> Dict[str, Any]:
    """Read the state in a folder.

    Raises:
        ValueError: If a file is missing or does not hold a state.
    """
    text, weights = (folder / name for name in FILES)
    kinds = {'dict': dict, 'list': list, 'tuple': tuple}
    try:
        tensors = read_tensors(weights)

        def decode(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            ((kind, content),) = value.items()
            if kind == 'tensor':
                return tensors[content]
            return kinds[kind](map(decode, content)) if kind != 'dict' else {decode(k): decode(v) for k, v in content}

        state = decode(read_mapping(text))
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f'{text} and {weights.name} hold no state ({type(error).__name__}: {error})') from error
    if not isinstance(state, dict):
        raise ValueError(f'{text} holds no state')
    return state
