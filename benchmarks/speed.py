"""Time and memory of a model against its base: pairs in turn in one process, so that a drift of the machine cancels."""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import timm
import torch
from torch.profiler import ProfilerActivity, profile

from .record import table


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


def _seconds(function: Callable, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def _peak_memory(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of the model's parameters and buffers, and the most that a training step adds to them at a time."""
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train_step(model, x)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    memory = sorted((e for e in events if e['name'] == '[memory]'), key=lambda event: event['ts'])
    before = memory[0]['args']['Total Allocated'] - memory[0]['args']['Bytes']
    step = max(event['args']['Total Allocated'] for event in memory) - before
    return step + sum(tensor.nbytes for tensor in model.state_dict().values())


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    models = [timm.create_model(name).to(memory_format=torch.channels_last) for name in (args.model, args.base)]
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size).to(memory_format=torch.channels_last)
    results: Dict[str, Any] = dict(model=args.model, base=args.base, batch_size=args.batch_size, img_size=args.img_size)
    for name, function in (('inference', _infer), ('training step', _train_step)):
        for model in models * 3:
            function(model, x)
        samples: List[List[float]] = []
        for pair in range(args.pairs):
            order = (0, 1) if pair % 2 else (1, 0)
            seconds = {i: _seconds(function, models[i], x) for i in order}
            samples.append([round(seconds[0], 5), round(seconds[1], 5)])
        results[name] = samples
    results['peak memory'] = [_peak_memory(model, x) for model in models]
    return results


def render(results: Dict[str, Any]) -> str:
    rows = []
    for name in ('inference', 'training step'):
        model, base = (sorted(column) for column in zip(*results[name], strict=True))
        ratios = sorted(a / b for a, b in results[name])
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append([
            name, f'{statistics.median(base):.3f} s', f'{statistics.median(model):.3f} s',
            f'{statistics.median(model) / statistics.median(base):.3f}',
            f'{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})',
        ])  # fmt: skip
    mebibytes = [size / 2**20 for size in results['peak memory']]
    rows.append([
        'peak memory of a training step', f'{mebibytes[1]:.0f} MiB', f'{mebibytes[0]:.0f} MiB',
        f'{mebibytes[0] / mebibytes[1]:.3f}', '',
    ])  # fmt: skip
    return (
        f'`{results["model"]}` against `{results["base"]}`, batch {results["batch_size"]} at {results["img_size"]} '
        f'pixels, channels last, {len(results["inference"])} pairs in turn.\n\n'
        + table(['', 'base, median', 'model, median', 'ratio', 'ratio by pair: median (quartiles)'], rows)
    )
