"""The block alone against its floor: the time to copy its bytes and to multiply its matrices.

Forward reads X and Y and writes the output; backward reads three maps, writes two, and has twice the multiply-adds. The
floor is the time of these bytes at the copy bandwidth (read and written) and of the multiply-adds at the rate of a
large matrix product, both measured in turn with the block. The shares of a step are those of PyTorch's profiler, whose
own time is in the small operations.
"""

import argparse
import copy
import statistics
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from timm_depla.layers import Depla

from .pairs import median_text, peak_memory, ratio_text, time_rounds
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
FLAGS = dict(shape=dict(nargs='+', default=SHAPES, metavar='BxCxHxW', help='identity and candidate'), pairs=40)


def _step(block: Depla, x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor) -> None:
    for tensor in (x, y, *block.parameters()):
        tensor.grad = None
    block(x, y).backward(gradient)


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def _macs(call: Callable[[], Any]) -> Dict[str, float]:
    """Multiply-adds of convolutions and of matrix products."""
    with FlopCounterMode(display=False) as counter:
        call()
    found = dict.fromkeys(('convolutions', 'matrix products'), 0.0)
    for operation, flops in counter.get_flop_counts()['Global'].items():
        found['convolutions' if 'conv' in str(operation) else 'matrix products'] += flops / 2
    return found


def _measure(bfn: str, shape: List[int], memory_format: torch.memory_format, rounds: int) -> Dict[str, Any]:
    block = Depla(shape[1], bfn=bfn).train().to(memory_format=memory_format)
    x, y = (torch.randn(shape).to(memory_format=memory_format).requires_grad_() for _ in range(2))
    gradient = torch.randn(shape).to(memory_format=memory_format)
    infer = torch.inference_mode()(partial(copy.deepcopy(block).eval(), x.detach(), y.detach()))
    steps = [along(form, partial(_step, copy.deepcopy(block), x, y, gradient)) for form in ('', '+plain')]
    out, macs = block(x, y), int(sum(_macs(along('+plain', infer)).values()))
    source, a, b = torch.randn(COPIED), *torch.randn(2, SIDE, SIDE)
    calls = [
        infer,
        partial(torch.autograd.grad, out, [x, y, *block.parameters()], gradient, retain_graph=True),
        partial(torch.empty_like(source).copy_, source),
        partial(torch.mm, a, b, out=torch.empty_like(a)),
        *steps,
    ]
    times = min(max(1, TIMED // macs), 20)
    samples = time_rounds([partial(_repeat, call, times) for call in calls], rounds)
    return dict(
        macs=macs, bytes=x.nbytes, samples=[[seconds / times for seconds in sample] for sample in samples],
        memory=list(map(peak_memory, steps)), profile=_profile(partial(_step, block, x, y, gradient), times),
    )  # fmt: skip


def _profile(step: Callable[[], Any], times: int) -> Dict[str, Dict[str, float]]:
    """Operations, seconds and multiply-adds of a step by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _repeat(step, times)
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    found = {kind: dict(operations=0.0, seconds=0.0, macs=0.0) for kind in (*KINDS, 'other')}
    for event in profiler.key_averages():
        entry = found[kind_of.get(event.key.removeprefix('aten::'), 'other')]
        entry['operations'] += event.count / times
        entry['seconds'] += event.self_cpu_time_total / 1e6 / times
    for kind, macs in _macs(step).items():
        found[kind]['macs'] = macs
    return found


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    return {
        f'{bfn}, ({", ".join(shape.split("x"))}), {name}': _measure(
            bfn, [int(side) for side in shape.split('x')], memory_format, args.pairs
        )
        for bfn in ('plain', 'adaptive')
        for shape in args.shape
        for name, memory_format in FORMATS.items()
    }


def _floors(result: Dict[str, Any], maps: int, times: int) -> List[Tuple[float, float]]:
    """Seconds of the bytes and of the multiply-adds in each round."""
    moved, macs = maps * result['bytes'], times * result['macs']
    return [
        (moved / (8 * COPIED) * copied, macs / SIDE**3 * product) for _, _, copied, product, *_ in result['samples']
    ]


def render(results: Dict[str, Any]) -> str:
    rows, steps = [], []
    for name, result in results.items():
        samples, row = result['samples'], [name]
        for i, (maps, times) in enumerate(((3, 1), (5, 2))):
            floors = _floors(result, maps, times)
            over = [(sample[i], sum(floor)) for sample, floor in zip(samples, floors, strict=True)]
            share = statistics.median(floor[0] / sum(floor) for floor in floors)
            row += [median_text(samples, i), ratio_text(over), f'{share:.0%}']
        rows.append(row)
        total = sum(entry['seconds'] for entry in result['profile'].values())
        shares = [f'{entry["seconds"] / total:.0%}' for entry in result['profile'].values()]
        times = [sample[4:] for sample in samples]
        steps.append([name, median_text(times, 0), ratio_text(times), ratio_text(result['memory']), *shares])
    samples = [sample for result in results.values() for sample in result['samples']]
    bandwidth, rate = (
        statistics.median(amount / sample[i] / 1e9 for sample in samples)
        for i, amount in ((2, 8 * COPIED), (3, SIDE**3))
    )
    header = ['block', 'forward', 'over its floor', 'of it bytes', 'backward', 'over its floor', 'of it bytes']
    return '\n\n'.join([
        f'Copy bandwidth {bandwidth:.1f} GB/s, matrix product {rate:.0f} G multiply-adds a second; times are medians.',
        table(header, rows),
        table(['training step', 'time', 'over the plain form', 'memory', *KINDS, 'other'], steps),
    ])  # fmt: skip
