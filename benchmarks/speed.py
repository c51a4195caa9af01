"""Time and memory of a model against its base: pairs in turn in one process, so that a drift of the machine cancels."""

import argparse
from functools import partial
from typing import Any, Dict

import timm
import torch

from .pairs import memory_row, peak_memory, render_rows, time_pairs, time_row


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', default='resnet50_depla', help='model to time')
    parser.add_argument('--base', default='resnet50', help='model to compare it with')
    parser.add_argument('--batch-size', type=int, default=8, help='images')
    parser.add_argument('--img-size', type=int, default=224, help='pixels')
    parser.add_argument('--pairs', type=int, default=40, help='pairs of timings')


def _infer(model: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        model.eval()(x)


def _train_step(model: torch.nn.Module, x: torch.Tensor) -> None:
    model.train().zero_grad()
    model(x).logsumexp(1).mean().backward()


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    models = [timm.create_model(name).to(memory_format=torch.channels_last) for name in (args.model, args.base)]
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size).to(memory_format=torch.channels_last)
    results: Dict[str, Any] = dict(model=args.model, base=args.base, batch_size=args.batch_size, img_size=args.img_size)
    for name, function in (('inference', _infer), ('training step', _train_step)):
        results[name] = time_pairs(*(partial(function, model, x) for model in models), args.pairs)
    results['peak memory'] = []
    for model in models:
        model.zero_grad()
        step = peak_memory(partial(_train_step, model, x))
        results['peak memory'].append(step + sum(tensor.nbytes for tensor in model.state_dict().values()))
    return results


def render(results: Dict[str, Any]) -> str:
    rows = [time_row(name, results[name]) for name in ('inference', 'training step')]
    rows.append(memory_row('peak memory of a training step', results['peak memory']))
    return (
        f'`{results["model"]}` against `{results["base"]}`, batch {results["batch_size"]} at {results["img_size"]} '
        f'pixels, channels last, {len(results["inference"])} pairs in turn.\n\n' + render_rows(rows)
    )
