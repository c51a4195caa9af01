"""Growth of time and memory with the image size: one block, timm's non-local block and the whole model.

The block has the resolution of stage 3, a sixteenth of the image's side. A step is forward and backward. The exponent
is the slope of the logarithm of time, or of memory, over the logarithm of the number of pixels.
"""

import argparse
import math
import statistics
from functools import partial
from typing import Any, Dict, List

import timm
import torch
from timm.layers import NonLocalAttn

from timm_depla.engine.distributed import keep_memory
from timm_depla.layers import Depla

from .pairs import peak_memory, seconds_text, time_rounds
from .record import table
from .speed import train_step

CHANNELS, STRIDE = 1024, 16


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', default='resnet50_depla')
    parser.add_argument('--base', default='resnet50')
    parser.add_argument('--img-size', type=int, nargs='+', default=[224, 320, 448, 640, 896], help='pixels')
    parser.add_argument('--batch-size', type=int, default=2, help='images')
    parser.add_argument('--pairs', type=int, default=10, help='timings of each')


def _step(block: torch.nn.Module, inputs: List[torch.Tensor]) -> None:
    block.zero_grad()
    block(*inputs).square().mean().backward()


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    keep_memory()
    names = ['block, plain', 'block, adaptive', 'non-local block', args.model, args.base]
    blocks = [Depla(CHANNELS), Depla(CHANNELS, bfn='adaptive'), NonLocalAttn(CHANNELS)]
    models = [timm.create_model(name) for name in (args.model, args.base)]
    modules = [module.train().to(memory_format=torch.channels_last) for module in (*blocks, *models)]
    results: Dict[str, Any] = dict(batch_size=args.batch_size, names=names, sizes={})
    for size in args.img_size:
        shape = (args.batch_size, CHANNELS, size // STRIDE, size // STRIDE)
        x, y = (torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
        images = torch.randn(args.batch_size, 3, size, size).to(memory_format=torch.channels_last)
        calls = [
            partial(_step, modules[0], [x, y]),
            partial(_step, modules[1], [x, y]),
            partial(_step, modules[2], [x]),
            *(partial(train_step, model, images) for model in modules[3:]),
        ]
        samples = time_rounds(calls, args.pairs)
        for module in modules:
            module.zero_grad()
        results['sizes'][size] = dict(samples=samples, memory=[peak_memory(call) for call in calls])
    return results


def exponent(sizes: List[int], seconds: List[float]) -> float:
    """Slope of log time over log pixels, by least squares."""
    return statistics.linear_regression([2 * math.log(size) for size in sizes], list(map(math.log, seconds))).slope


def render(results: Dict[str, Any]) -> str:
    sizes = [int(size) for size in results['sizes']]
    parts = list(results['sizes'].values())
    rows = []
    for i, name in enumerate(results['names']):
        seconds = [statistics.median(sample[i] for sample in part['samples']) for part in parts]
        memory = [part['memory'][i] / 2**20 for part in parts]
        cells = [f'{seconds_text(s)}, {m:.0f} MiB' for s, m in zip(seconds, memory, strict=True)]
        rows.append([name, *cells, f'{exponent(sizes, seconds):.2f}', f'{exponent(sizes, memory):.2f}'])
    header = ['', *(f'{size} pixels' for size in sizes), 'exponent of time', 'of memory']
    return (
        f'A training step of {results["batch_size"]} images, channels last: median of {len(parts[0]["samples"])} in '
        'turn, and the most memory allocated during it.\n\n' + table(header, rows)
    )


def plot(results: Dict[str, Any]) -> Any:
    """Time over the image's side, on logarithmic scales."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 4), layout='constrained')).subplots()
    sizes = list(map(int, results['sizes']))
    for i, name in enumerate(results['names']):
        samples = [result['samples'] for result in results['sizes'].values()]
        axes.loglog(sizes, [statistics.median(s[i] for s in sample) for sample in samples], 'o-', label=name)
    axes.set_xticks(sizes, map(str, sizes), minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel='side of the image (pixels)', ylabel='forward and backward (s)')
    figure.legend(loc='outside right upper')
    return figure
