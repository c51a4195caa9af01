"""FPN-DEPLA over FPN at the size of detection: the whole detector, and the pyramid alone.

The untrained detectors score the same 1,000 proposals of an image. A training step is forward and backward.
"""

import argparse
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import nn

from timm_depla.detection import create_detector

from .pairs import median_text, peak_memory, ratio_text, time_rounds
from .record import table
from .speed import along

KINDS = {
    'detector': 'detector, inference',
    'detector memory': 'detector, memory of inference',
    'detector training memory': 'detector, memory of a training step',
    'neck': 'pyramid, inference',
    'neck training': 'pyramid, training step',
    'neck memory': 'pyramid, memory of a training step',
}
FLAGS = dict(model='maskrcnn_resnet50_fpn_depla', base='maskrcnn_resnet50_fpn', path=[], img_size=800, pairs=20)


@torch.inference_mode()
def _infer(model: nn.Module, x: Any) -> None:
    model(x)


def _train_detector(model: nn.Module, images: List[torch.Tensor], targets: List[Dict[str, torch.Tensor]]) -> None:
    model.zero_grad()
    sum(model(images, targets).values()).backward()


def _train_neck(neck: nn.Module, maps: Dict[str, torch.Tensor]) -> None:
    neck.zero_grad()
    sum(level.square().mean() for level in neck(maps).values()).backward()


def create_detectors(
    names: List[str], height: int, width: int, device: str = 'cpu', **kwargs: Any
) -> Tuple[List[nn.Module], torch.Tensor, Dict[str, torch.Tensor]]:
    """Detectors that score the same proposals, an image of this size, and its ten objects."""
    kwargs.update(min_size=min(height, width), max_size=max(height, width))
    detectors = [create_detector(name, **kwargs).to(device).eval() for name in names]
    limit = torch.tensor([width, height, width, height], device=device) / 2
    proposals = torch.rand(1000, 4, device=device) * limit
    proposals[:, 2:] += proposals[:, :2]
    for detector in detectors:
        detector.rpn.register_forward_hook(lambda _, __, found: ([proposals] * len(found[0]), found[1]))
        detector.roi_heads.score_thresh = 1.0
    masks = torch.ones(10, height, width, dtype=torch.uint8, device=device)
    target = dict(boxes=proposals[:10], labels=torch.arange(1, 11, device=device), masks=masks)
    return detectors, torch.rand(3, height, width, device=device), target


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    size = args.img_size
    specs = [args.model, *(f'{args.model}+{path}' for path in args.path), args.base]
    detectors, image, target = create_detectors([spec.partition('+')[0] for spec in specs], size, size)
    necks = [detector.backbone.fpn for detector in detectors]
    with torch.inference_mode():
        features = detectors[-1].backbone.body(torch.randn(1, 3, size, size))
    maps = OrderedDict((str(i), feature.clone()) for i, feature in enumerate(features))

    def calls(function: Callable, modules: List[nn.Module], *inputs: Any) -> List[Callable[[], Any]]:
        return [along(spec, partial(function, module, *inputs)) for spec, module in zip(specs, modules, strict=True)]

    results: Dict[str, Any] = dict(model=args.model, base=args.base, paths=args.path, img_size=size)
    results['detector'] = time_rounds(calls(_infer, detectors, [image]), args.pairs)
    results['detector memory'] = list(map(peak_memory, calls(_infer, detectors, [image])))
    steps = calls(_train_detector, [detector.train() for detector in detectors], [image], [target])
    results['detector training memory'] = list(map(peak_memory, steps))
    results['neck'] = time_rounds(calls(_infer, [neck.eval() for neck in necks], maps), args.pairs)
    maps = OrderedDict((name, level.clone().requires_grad_()) for name, level in maps.items())
    steps = calls(_train_neck, [neck.train() for neck in necks], maps)
    results['neck training'] = time_rounds(steps, args.pairs)
    results['neck memory'] = list(map(peak_memory, steps))
    return results


def render(results: Dict[str, Any]) -> str:
    rows = []
    for kind, label in KINDS.items():
        values = results[kind]
        ratios = [ratio_text(values, column) for column in range(1 + len(results['paths']))]
        rows.append([label, median_text(values, -1), median_text(values, 0), *ratios])
    header = ['', 'base', 'model', 'ratio: median (95% interval)', *(f'ratio, {path}' for path in results['paths'])]
    about = (
        f'`{results["model"]}` over `{results["base"]}`, {results["img_size"]} pixels, {len(results["neck"])} turns.'
    )
    return f'{about}\n\n{table(header, rows)}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    on = f'FPN, {results["img_size"]} pixels, CPU'
    kinds = {'detector': 'inference', 'detector training memory': 'memory of a training step'}
    return [(f'{what} of Mask R-CNN with FPN-DEPLA', ratio_text(results[kind]), on) for kind, what in kinds.items()]
