"""What a model costs a GPU at least, counted without one: kernels, bytes and multiply-adds.

The model runs on fake tensors, which have sizes and types but no data, in channels-last format under autocast to
bfloat16. Each operation that PyTorch dispatches counts as one kernel, unless it only makes a view or allocates; the
backward pass of a convolution counts as one for each gradient. A kernel reads its inputs and writes its outputs once:
its time is at least that of these bytes at the GPU's bandwidth, and that of its multiply-adds at the GPU's matrix rate;
a model's device time is the sum over its kernels. Eager execution takes at least as long as launching them all takes.
The form of the block is that on a GPU. The numbers of the GPU are its maker's (H100 SXM: 3.35 TB/s, 989
TFLOPS dense in bfloat16); a launch is taken as 5 us. None of this is a measurement, and the operations are those of a
CPU's autocast, whose list of types differs a little.
`speed --device cuda --amp` measures.
"""

import argparse
from collections import Counter
from functools import partial
from typing import Any, Dict, List
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from timm_depla.layers import Depla

from .record import table
from .speed import KINDS, along, create_model, train_step

BANDWIDTH = 3.35e12  # bytes a second
RATE = 989e12 / 2  # multiply-adds a second
LAUNCH = 5e-6  # seconds
NO_KERNEL = ('_unsafe_view', 'alias', 'detach', 'empty', 'is_same_size', 'lift_fresh', 'new_empty')  # beside views


class KernelCounter(TorchDispatchMode):
    """Counts the kernels that are dispatched in its context.

    Attributes:
        kernels: Their number by operation.
        bytes, macs: What they move and multiply.
        seconds: The sum of the least times of each on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter = Counter()
        self.bytes, self.macs, self.seconds = 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix('aten::')
        if func.is_view or name in NO_KERNEL or name.startswith('prim::'):
            return out
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
        count = flop_registry.get(func._overloadpacket)
        macs = count(*args, **kwargs, out_val=out) // 2 if count else 0
        self.kernels[name] += len(outputs) if name == 'convolution_backward' else 1
        self.bytes, self.macs = self.bytes + moved, self.macs + macs
        self.seconds += max(moved / BANDWIDTH, macs / RATE)
        return out


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', nargs='+', default=['resnet50_depla', 'resnet50_depla_adaptive', 'seresnet50_depla'])
    parser.add_argument('--base', default='resnet50', help='model to compare them with')
    parser.add_argument('--batch-size', type=int, default=256, help='images')
    parser.add_argument('--img-size', type=int, default=224, help='pixels')


def _count(call: Any) -> Dict[str, Any]:
    with KernelCounter() as counter:
        call()
    return dict(
        kernels=sum(counter.kernels.values()), bytes=counter.bytes, macs=counter.macs, seconds=counter.seconds,
        most=dict(counter.kernels.most_common(8)),
    )  # fmt: skip


def _infer(model: torch.nn.Module, x: torch.Tensor) -> None:
    with (
        torch.autocast(x.device.type, torch.bfloat16),
        torch.no_grad(),
    ):  # in inference mode, what is composed counts as one
        model(x)


def run(args: argparse.Namespace) -> Dict[str, Any]:
    results: Dict[str, Any] = dict(batch_size=args.batch_size, img_size=args.img_size, names=[*args.model, args.base])
    with FakeTensorMode(), patch('timm_depla.layers.fused.pays', lambda x, on_gpu: x.numel() >= on_gpu):
        for name in results['names']:
            model = create_model(name, args.img_size)
            x = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
            x = x.contiguous(memory_format=torch.channels_last)
            results[name] = {}
            for kind, call in zip(KINDS, (partial(_infer, model, x), partial(train_step, model, x, True)), strict=True):
                model.train(kind != 'inference')
                results[name][kind] = _count(along(name, call))
            results[name]['blocks'] = sum(isinstance(module, Depla) for module in model.modules())
    return results


def render(results: Dict[str, Any]) -> str:
    *names, base = results['names']
    rows: List[List[Any]] = []
    for kind in KINDS:
        plain = results[base][kind]
        for name in (*names, base):
            found, blocks = results[name][kind], results[name]['blocks']
            more = f'{(found["kernels"] - plain["kernels"]) / blocks:.1f}' if blocks else ''
            rows.append([
                f'`{name}`', kind, f'{found["macs"] / 1e9:.0f} G', f'{found["bytes"] / 1e9:.1f} GB',
                f'{found["bytes"] / plain["bytes"]:.3f}', f'{found["seconds"] * 1000:.1f} ms',
                f'{found["seconds"] / plain["seconds"]:.3f}', found['kernels'], more,
                f'{found["kernels"] * LAUNCH * 1000:.1f} ms',
            ])  # fmt: skip
    header = ['', '', 'multiply-adds', 'bytes', 'ratio', 'device time, at least', 'ratio', 'kernels']
    header += ['more for each block', 'launches']
    about = f'Batch {results["batch_size"]} at {results["img_size"]} pixels. Ratios are to `{base}`.'
    return f'{about}\n\n{table(header, rows)}'
