"""The tensors of DEPLA blocks while a model runs, and measures of their maps."""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, Iterator, List, Union

import torch
import torch.nn as nn
from torch import Tensor

from timm_depla.layers import Depla, set_fused_depla

__all__ = ['BlockCapture', 'capture', 'capturing', 'find_blocks', 'measure', 'strength', 'without_refinement']


@dataclass
class BlockCapture:
    """Tensors of a DEPLA block's forward pass, without gradients, on the model's device.

    Attributes:
        identity: X (B, C1, H, W), or smaller if the candidate is the larger map.
        candidate: Y (B, C2, h, w).
        maps: ROI maps M (B, L, D, H, W), each a distribution over its positions.
        features: Back-filled vector of each group, (B, L, C1): pooled, transformed and projected, before the norm.
        heatmaps: Back-filling heatmaps B (B, L, H, W), each a distribution over its positions.
        output: (B, C1, H, W).
    """

    identity: Tensor
    candidate: Tensor
    maps: Tensor
    features: Tensor
    heatmaps: Tensor
    output: Tensor


def find_blocks(model: nn.Module) -> Dict[str, Depla]:
    """The DEPLA blocks of a model by their module names.

    Raises:
        ValueError: If it has none, or is compiled or scripted: hooks would change or miss what runs.
    """
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError('a scripted model cannot be looked into: pass the model that it was scripted from')
        if hasattr(module, '_orig_mod') or getattr(module, '_compiled_call_impl', None) is not None:
            raise ValueError('a compiled model cannot be looked into: pass the model as it was before torch.compile')
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Depla)}
    if not blocks:
        raise ValueError(f'{type(model).__name__} has no DEPLA block to look into')
    return blocks


@contextmanager
def capturing(model: nn.Module) -> Iterator[Dict[str, BlockCapture]]:
    """Context manager whose dictionary each call of the model fills, by the blocks' module names.

    Its hooks change no result; they are removed at the end, also after an error. The fused form is off meanwhile.

    Raises:
        ValueError: If the model has no DEPLA block, or is compiled or scripted.
    """
    found: Dict[str, BlockCapture] = {}

    def keep(parts: Dict[str, Any], key: str, _: nn.Module, __: Any, output: Any) -> None:
        parts[key] = output

    def end(parts: Dict[str, Any], name: str, _: nn.Module, inputs: Any, output: Tensor) -> None:
        x, y, output = (tensor.detach().clone() for tensor in (*inputs, output))  # an in-place activation may follow
        maps, features, heatmaps = parts['maps'], parts['features'], parts['bfn'][1]
        found[name] = BlockCapture(x, y, maps.detach(), features.detach(), heatmaps.detach(), output)
        parts.clear()

    with ExitStack() as stack:
        for name, block in find_blocks(model).items():
            parts: Dict[str, Any] = {}
            for key, part in dict(maps=block.rpn, bfn=block.bfn, features=block.proj).items():
                stack.enter_context(part.register_forward_hook(partial(keep, parts, key)))
            stack.enter_context(block.register_forward_hook(partial(end, parts, name)))
        stack.enter_context(set_fused_depla(False))
        yield found


@contextmanager
def without_refinement(model: nn.Module) -> Iterator[None]:
    """Context manager in which DEPLA adds nothing: its blocks return X, or what `keep_candidate` keeps.

    Raises:
        ValueError: If the model has no DEPLA block, or is compiled or scripted.
    """
    with ExitStack() as stack:
        for block in find_blocks(model).values():
            stack.enter_context(block.norm.register_forward_hook(lambda _, __, output: torch.zeros_like(output)))
        yield


def capture(model: nn.Module, images: Union[Tensor, List[Tensor]]) -> Dict[str, BlockCapture]:
    """Run a model in evaluation mode and return the tensors of its DEPLA blocks, by their module names.

    Example:
        blocks = capture(model, images)
        blocks['layer3.5.depla'].maps  # (B, L, D, H, W)

    Args:
        model: A classifier, backbone or detector; its mode is restored afterwards.
        images: Its input: (B, C, H, W), or a list of (C, H, W) for a detector.

    Raises:
        ValueError: If the model has no DEPLA block, or is compiled or scripted.
    """
    with capturing(model) as found, torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, 'training', module.training)
        model.eval()(images)
    return found


def strength(block: BlockCapture) -> Tensor:
    """How much each group changes the output, (B, L): norm of its vector times the contrast of its heatmap."""
    heatmaps = block.heatmaps.flatten(2)
    contrast = (heatmaps * heatmaps.shape[-1]).std(dim=2)  # (B, L)
    return block.features.norm(dim=2) * contrast


def measure(block: BlockCapture) -> Dict[str, Tensor]:
    """Measures of each group's maps, (B, L).

    Returns:
        `entropy` of its ROI maps, their mean over D, from 0 (one position) to 1 (uniform); `coverage`, the share of
        positions where the mean of its maps is above the uniform one; `map_peak` and `heatmap_peak`, the strongest
        position of its ROI maps (their mean over D) and of its heatmap, 1 if uniform; `strength`, see the function.
    """
    maps = block.maps.flatten(3).double()  # (B, L, D, N)
    count = maps.shape[-1]
    entropy = -torch.special.xlogy(maps, maps).sum(3) / max(math.log(count), 1e-12)
    coverage = (maps.mean(2) > (1 + 1e-4) / count).double().mean(2)
    return dict(
        entropy=entropy.mean(2),
        coverage=coverage,
        map_peak=count * maps.amax(3).mean(2),
        heatmap_peak=count * block.heatmaps.flatten(2).double().amax(2),
        strength=strength(block).double(),
    )
