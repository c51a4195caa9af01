"""FPN-DEPLA against FPN at the size of detection: the whole detector, and the neck alone.

The C library keeps freed memory, as in train_detection.py.
"""

import argparse
from collections import OrderedDict
from functools import partial
from typing import Any, Dict

import torch
from torch import nn

from timm_depla.detection import create_detector
from timm_depla.engine.distributed import keep_memory

from .pairs import memory_row, peak_memory, render_rows, time_rounds, time_row
from .speed import along

LABELS = {
    'detector': 'detector, inference',
    'detector memory': 'detector, peak memory of inference',
    'detector training memory': 'detector, peak memory of a training step',
    'neck': 'neck, inference',
    'neck training': 'neck, training step',
    'neck memory': 'neck, peak memory of a training step',
}


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', default='maskrcnn_resnet50_fpn_depla', help='detector to time')
    parser.add_argument('--base', default='maskrcnn_resnet50_fpn', help='detector to compare it with')
    parser.add_argument('--path', nargs='*', default=[], metavar='PATH', help='forms of the model, see `speed`')
    parser.add_argument('--img-size', type=int, default=800, help='pixels')
    parser.add_argument('--pairs', type=int, default=20, help='pairs of timings')


@torch.inference_mode()
def _infer(model: nn.Module, x: Any) -> None:
    model(x)


def _train_detector(model: nn.Module, image: torch.Tensor, target: Dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    sum(model([image], [target]).values()).backward()


def _train_step(neck: nn.Module, maps: Dict[str, torch.Tensor]) -> None:
    neck.zero_grad()
    sum(level.square().mean() for level in neck(maps).values()).backward()


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    keep_memory()
    kwargs = dict(min_size=args.img_size, max_size=args.img_size)
    specs = [args.model, *(f'{args.model}+{path}' for path in args.path), args.base]
    detectors = [create_detector(spec.partition('+')[0], **kwargs).eval() for spec in specs]
    image = torch.rand(3, args.img_size, args.img_size)
    with torch.inference_mode():
        features = detectors[-1].backbone.body(torch.randn(1, 3, args.img_size, args.img_size))
    maps = OrderedDict((str(i), feature.clone()) for i, feature in enumerate(features))
    necks = [detector.backbone.fpn for detector in detectors]
    results: Dict[str, Any] = dict(model=args.model, base=args.base, paths=args.path, img_size=args.img_size)
    wrap = [partial(along, spec) for spec in specs]
    top_left = torch.rand(1000, 2) * args.img_size / 2
    proposals = torch.cat([top_left, top_left + torch.rand(1000, 2) * args.img_size / 2], dim=1)
    for detector in detectors:  # untrained, they find different objects: both score the same proposals and report none
        detector.rpn.register_forward_hook(lambda _, __, output: ([proposals], output[1]))
        detector.roi_heads.score_thresh = 1.0
    results['detector'] = time_rounds(
        [run(partial(_infer, detector, [image])) for run, detector in zip(wrap, detectors, strict=True)], args.pairs
    )
    results['detector memory'] = [peak_memory(partial(_infer, detector, [image])) for detector in detectors]
    boxes = proposals[:10]
    masks = torch.ones(10, args.img_size, args.img_size, dtype=torch.uint8)
    target = dict(boxes=boxes, labels=torch.arange(1, 11), masks=masks)
    steps = [
        run(partial(_train_detector, each.train(), image, target)) for run, each in zip(wrap, detectors, strict=True)
    ]
    results['detector training memory'] = [peak_memory(step) for step in steps]
    results['neck'] = time_rounds(
        [run(partial(_infer, neck.eval(), maps)) for run, neck in zip(wrap, necks, strict=True)], args.pairs
    )
    maps = OrderedDict((name, level.clone().requires_grad_()) for name, level in maps.items())
    steps = [run(partial(_train_step, neck.train(), maps)) for run, neck in zip(wrap, necks, strict=True)]
    results['neck training'] = time_rounds(steps, args.pairs)
    results['neck memory'] = [peak_memory(step) for step in steps]
    return results


def render(results: Dict[str, Any]) -> str:
    rows = []
    for i, path in enumerate(['', *results.get('paths', [])]):
        for kind, label in LABELS.items():
            name = f'{label} +{path}' if path else label
            values = results[kind]
            if 'memory' in kind:
                rows.append(memory_row(name, [values[i], values[-1]]))
            else:
                rows.append(time_row(name, [[sample[i], sample[-1]] for sample in values]))
    size = results['img_size']
    return (
        f'`{results["model"]}` against `{results["base"]}`, one image of {size} x {size} pixels, '
        f'{len(results["neck"])} pairs in turn.\n\n' + render_rows(rows)
    )
