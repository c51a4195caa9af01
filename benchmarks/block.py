"""The block alone against its floor: the time to copy its bytes, plus its multiply-adds as one matrix product.

Forward reads X and Y and writes the output. Backward reads X, Y and the output's gradient, writes two gradients, and
has twice the multiply-adds. The floor is the time of these bytes at the copy bandwidth (read and written) plus that of
the multiply-adds at the rate of a large matrix product, both measured alternately with the block. Each timing repeats
the call until the block has 5 G multiply-adds, at most 20 times. A training step, forward and backward, is compared
with the plain form of the same block. The profile is
that of PyTorch's profiler, whose own time is in the small operations. It shows what is above the floor: convolutions to
64 channels and products of 16 or 17 terms are slower than the large product; the sum with X and that of its two
gradients write a map each; the rest are small operations.
"""

import argparse
import copy
import statistics
from functools import partial
from typing import Any, Callable, Dict, List

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from timm_depla.engine.distributed import keep_memory
from timm_depla.layers import Depla
from timm_depla.models.cost import count_macs

from .pairs import peak_memory, ratio_text, seconds_text, time_rounds
from .record import table
from .speed import along

SHAPES = ['1x1024x14x14', '8x1024x14x14', '32x1024x14x14', '2x256x200x304']
FORMATS = {'channels last': torch.channels_last, 'contiguous': torch.contiguous_format}
COPIED = 2**24  # elements
SIDE = 1024  # of the matrices
TIMED = 5 * 10**9  # multiply-adds
KINDS = {
    'convolutions': ('mkldnn_convolution', 'convolution_backward', '_slow_conv2d_forward'),
    'matrix products': ('mm', 'bmm', 'baddbmm', 'addmm'),
    'sums and copies': ('add', 'add_', 'sum', 'copy_', 'cat'),
    'norms': ('native_batch_norm', 'native_batch_norm_backward', 'var_mean', 'lerp_', 'rsqrt', 'addcmul'),
    'softmax and others by element': ('_softmax', '_softmax_backward_data', 'log', 'clamp', 'div', 'where', 'mul'),
}


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--shape', nargs='+', default=SHAPES, metavar='BxCxHxW', help='identity and candidate')
    parser.add_argument('--pairs', type=int, default=40, help='timings of each')


def _infer(block: Depla, x: torch.Tensor, y: torch.Tensor) -> None:
    with torch.inference_mode():
        block(x, y)


def _measure(bfn: str, shape: List[int], memory_format: torch.memory_format, rounds: int) -> Dict[str, Any]:
    block = Depla(shape[1], bfn=bfn)
    macs = shape[0] * count_macs(_Pair(block).to('meta').eval(), shape[1:])
    block = Depla(shape[1], bfn=bfn).train().to(memory_format=memory_format)
    x, y = (torch.randn(shape).to(memory_format=memory_format).requires_grad_() for _ in range(2))
    gradient = torch.randn(shape).to(memory_format=memory_format)
    plain = copy.deepcopy(block)
    out = block(x, y)
    inputs = [x, y, *block.parameters()]
    steps = [along(form, partial(_step, module, x, y, gradient)) for form, module in (('', block), ('+plain', plain))]
    infer = copy.deepcopy(block).eval()
    source, a, b = torch.randn(COPIED), *torch.randn(2, SIDE, SIDE)
    target, product = torch.empty_like(source), torch.empty_like(a)
    calls = [
        partial(_infer, infer, x.detach(), y.detach()),
        partial(torch.autograd.grad, out, inputs, gradient, retain_graph=True),
        partial(target.copy_, source),
        partial(torch.mm, a, b, out=product),
        *steps,
    ]
    times = min(max(1, TIMED // macs), 20)
    samples = time_rounds([partial(_repeat, call, times) for call in calls], rounds)
    samples = [[seconds / times for seconds in sample] for sample in samples]
    memory = [peak_memory(step) for step in steps]
    return dict(
        macs=macs, bytes=x.nbytes, samples=samples, memory=memory, profile=_profile(block, x, y, gradient, times)
    )


def _profile(
    block: Depla, x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor, times: int
) -> Dict[str, Dict[str, float]]:
    """Operations, seconds and multiply-adds of a step by kind of operation."""

    def step() -> None:
        for tensor in (x, y, *block.parameters()):
            tensor.grad = None
        block(x, y).backward(gradient)

    with FlopCounterMode(display=False) as counter:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _repeat(step, times)
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    found = {kind: dict(operations=0.0, seconds=0.0, macs=0.0) for kind in (*KINDS, 'other')}
    for event in profiler.key_averages():
        entry = found[kind_of.get(event.key.removeprefix('aten::'), 'other')]
        entry['operations'] += event.count / times
        entry['seconds'] += event.self_cpu_time_total / 1e6 / times
    for operation, flops in counter.get_flop_counts()['Global'].items():
        is_conv = 'conv' in str(operation)
        found['convolutions' if is_conv else 'matrix products']['macs'] += flops / 2
    return found


def _step(block: Depla, x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor) -> None:
    torch.autograd.grad(block(x, y), [x, y, *block.parameters()], gradient)


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


class _Pair(torch.nn.Module):
    """The block as a function of one tensor, for counting."""

    def __init__(self, block: Depla) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, x)


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    keep_memory()
    return {
        f'{bfn}, ({", ".join(shape.split("x"))}), {name}': _measure(
            bfn, [int(side) for side in shape.split('x')], memory_format, args.pairs
        )
        for bfn in ('plain', 'adaptive')
        for shape in args.shape
        for name, memory_format in FORMATS.items()
    }


def render(results: Dict[str, Any]) -> str:
    rows, steps = [], []
    for name, result in results.items():
        for i, (kind, maps, times) in enumerate((('forward', 3, 1), ('backward', 5, 2))):
            moved, macs = maps * result['bytes'], times * result['macs']
            floors = [
                (moved / (8 * COPIED) * copied, macs / SIDE**3 * product)
                for _, _, copied, product, *_ in result['samples']
            ]
            parts = [statistics.median(values) for values in zip(*floors, strict=True)]
            seconds = [sample[i] for sample in result['samples']]
            rows.append([
                name, kind, f'{moved / 1e6:.0f} MB', f'{macs / 1e9:.2f} G', *map(seconds_text, parts),
                seconds_text(statistics.median(seconds)),
                ratio_text([second / sum(floor) for second, floor in zip(seconds, floors, strict=True)]),
            ])  # fmt: skip
        times = [sample[4:] for sample in result['samples']]
        medians = [statistics.median(seconds) for seconds in zip(*times, strict=True)]
        fast, plain = result['memory']
        steps.append([
            name, *map(seconds_text, medians), ratio_text([fast / plain for fast, plain in times]),
            f'{fast / 2**20:.1f} MiB', f'{plain / 2**20:.1f} MiB', f'{fast / plain:.3f}',
        ])  # fmt: skip
    samples = [sample for result in results.values() for sample in result['samples']]
    rate = statistics.median(SIDE**3 / product for _, _, _, product, *_ in samples)
    profiles = [
        [
            name if kind == 'convolutions' else '', kind, '' if kind == 'other' else f'{entry["operations"]:.0f}',
            seconds_text(entry['macs'] / rate) if entry['macs'] else '', seconds_text(entry['seconds']),
            f'{entry["seconds"] / sum(other["seconds"] for other in result["profile"].values()):.0%}',
        ]
        for name, result in results.items()
        for kind, entry in result['profile'].items()
    ]  # fmt: skip
    bandwidth = statistics.median(8 * COPIED / copied for _, _, copied, *_ in samples)
    return (
        f'Copy bandwidth {bandwidth / 1e9:.1f} GB/s, matrix product {rate / 1e9:.0f} G multiply-adds a second. Times '
        'are medians, the ratio is that to the sum of the two floors, round by round: median (95% interval).\n\n'
        + table(['block', '', 'moved', 'multiply-adds', 'floor, bytes', 'floor, multiply-adds', 'time', 'ratio'], rows)
        + '\n\n'
        + table(['training step', 'fused', 'plain form', 'ratio', 'peak memory', 'plain form', 'ratio'], steps)
        + '\n\n'
        + table(['training step', 'operation', 'number', 'floor, multiply-adds', 'time', 'share'], profiles)
    )
