"""Growth of time and memory with the image size: one block, timm's non-local block and the whole model.

The block has the resolution of stage 3, a sixteenth of the image's side. A step is forward and backward. The exponent
is the slope of the logarithm of time, or of memory, over that of the number of pixels.
"""

import argparse
import math
import statistics
from functools import partial
from typing import Any, Dict, List, Tuple

import timm
import torch
from timm.layers import NonLocalAttn

from timm_depla.layers import Depla

from .pairs import peak_memory, seconds_text, time_rounds
from .record import table
from .speed import random_images, train_step

CHANNELS, STRIDE = 1024, 16
FLAGS = dict(model='resnet50_depla', base='resnet50', img_size=[224, 320, 448, 640, 896], batch_size=2, pairs=10)


def _step(block: torch.nn.Module, inputs: List[torch.Tensor]) -> None:
    block.zero_grad()
    block(*inputs).square().mean().backward()


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    names = ['block, plain', 'block, adaptive', 'non-local block', args.model, args.base]
    blocks = [Depla(CHANNELS), Depla(CHANNELS, bfn='adaptive'), NonLocalAttn(CHANNELS)]
    models = [timm.create_model(name) for name in (args.model, args.base)]
    modules = [module.train().to(memory_format=torch.channels_last) for module in (*blocks, *models)]
    results: Dict[str, Any] = dict(batch_size=args.batch_size, names=names, sizes={})
    for size in args.img_size:
        shape = (args.batch_size, CHANNELS, size // STRIDE, size // STRIDE)
        x, y = (torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
        images = random_images(args.batch_size, size)
        calls = [partial(_step, modules[i], [x, y][: 2 - i // 2]) for i in range(3)]  # the third takes one map
        calls += [partial(train_step, model, images) for model in modules[3:]]
        samples = time_rounds(calls, args.pairs)
        for module in modules:
            module.zero_grad()
        results['sizes'][size] = dict(samples=samples, memory=[peak_memory(call) for call in calls])
    return results


def _columns(results: Dict[str, Any], i: int) -> Tuple[List[float], List[float]]:
    """Median seconds and MiB of a module by size."""
    parts = list(results['sizes'].values())
    seconds = [statistics.median(sample[i] for sample in part['samples']) for part in parts]
    return seconds, [part['memory'][i] / 2**20 for part in parts]


def _exponent(results: Dict[str, Any], values: List[float]) -> str:
    """Slope of a logarithm over that of the pixels, by least squares."""
    pixels = [2 * math.log(int(size)) for size in results['sizes']]
    return f'{statistics.linear_regression(pixels, list(map(math.log, values))).slope:.2f}'


def render(results: Dict[str, Any]) -> str:
    rows = []
    for i, name in enumerate(results['names']):
        seconds, memory = _columns(results, i)
        cells = [f'{seconds_text(s)}, {m:.0f} MiB' for s, m in zip(seconds, memory, strict=True)]
        rows.append([name, *cells, _exponent(results, seconds), _exponent(results, memory)])
    header = ['', *(f'{size} pixels' for size in results['sizes']), 'exponent of time', 'of memory']
    return f'Batch {results["batch_size"]}, channels last: medians.\n\n{table(header, rows)}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    sizes = list(results['sizes'])
    return [
        (f'exponent of time over pixels: {name}', _exponent(results, _columns(results, i)[0]),
         f'{sizes[0]} to {sizes[-1]} pixels, CPU')
        for i, name in enumerate(results['names']) if name in ('block, plain', 'non-local block')
    ]  # fmt: skip
