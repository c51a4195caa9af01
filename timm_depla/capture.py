"""The tensors of DEPLA blocks while a model runs, and measures of their maps."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
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
    blocks = find_blocks(model)
    found: Dict[str, BlockCapture] = {}
    seen: Dict[str, Dict[str, Any]] = {name: {} for name in blocks}
    handles = []

    def keep(name: str, key: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name][key] = output

        return hook

    def end(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            parts = seen[name]
            found[name] = BlockCapture(
                identity=inputs[0].detach().clone(),  # an in-place activation may follow
                candidate=inputs[1].detach().clone(),
                maps=parts['maps'].detach(),
                features=parts['features'].detach(),
                heatmaps=parts['bfn'][1].detach(),
                output=output.detach().clone(),
            )
            parts.clear()

        return hook

    try:
        for name, block in blocks.items():
            parts = dict(maps=block.rpn, bfn=block.bfn, features=block.proj)
            handles += [part.register_forward_hook(keep(name, key)) for key, part in parts.items()]
            handles.append(block.register_forward_hook(end(name)))
        with set_fused_depla(False):
            yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_refinement(model: nn.Module) -> Iterator[None]:
    """Context manager in which DEPLA adds nothing: its blocks return X, or what `keep_candidate` keeps.

    Raises:
        ValueError: If the model has no DEPLA block, or is compiled or scripted.
    """
    norms = [block.norm for block in find_blocks(model).values()]
    handles = [norm.register_forward_hook(lambda _, __, output: torch.zeros_like(output)) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    was_training = [module for module in model.modules() if module.training]
    try:
        with capturing(model) as found, torch.no_grad():
            model.eval()
            model(images)
    finally:
        for module in was_training:
            module.training = True
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
