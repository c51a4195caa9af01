"""What a model costs a GPU at least, counted without one.

The model runs on fake tensors, channels last, under autocast to bfloat16, in the form that it has on a GPU. Each
operation that PyTorch dispatches is a kernel, unless it only makes a view or allocates; a convolution's backward pass
has one for each gradient. A kernel takes at least the time of its inputs and outputs at the bandwidth of an H100 SXM
(3.35 TB/s by its maker), and of its multiply-adds at 989 TFLOPS; device time is the sum. A launch takes 5 us at least.
"""

import argparse
from functools import partial
from typing import Any, Dict, List, Tuple
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from timm_depla.layers import Depla

from .record import table
from .speed import KINDS, along, create_model, random_images, train_step

BANDWIDTH = 3.35e12  # bytes a second
RATE = 989e12 / 2  # multiply-adds a second
LAUNCH = 5e-6  # seconds
NO_KERNEL = ('_unsafe_view', 'alias', 'detach', 'empty', 'is_same_size', 'lift_fresh', 'new_empty')  # beside views
MODELS = ['resnet50_depla', 'resnet50_depla_adaptive', 'seresnet50_depla']
FLAGS = dict(model=MODELS, base='resnet50', batch_size=256, img_size=224)


class KernelCounter(TorchDispatchMode):
    """Counts the kernels of its context, what they move and multiply, and the sum of the least times of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found = dict(kernels=0, bytes=0, macs=0, seconds=0.0)

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
        self.found['kernels'] += len(outputs) if name == 'convolution_backward' else 1
        self.found['bytes'] += moved
        self.found['macs'] += macs
        self.found['seconds'] += max(moved / BANDWIDTH, macs / RATE)
        return out


def _count(call: Any) -> Dict[str, Any]:
    with KernelCounter() as counter:
        call()
    return counter.found


def _infer(model: torch.nn.Module, x: torch.Tensor) -> None:
    """Not in inference mode, where PyTorch dispatches several operations as one."""
    with torch.autocast(x.device.type, torch.bfloat16), torch.no_grad():
        model(x)


def run(args: argparse.Namespace) -> Dict[str, Any]:
    results: Dict[str, Any] = dict(batch_size=args.batch_size, img_size=args.img_size, names=[*args.model, args.base])
    with FakeTensorMode(), patch('timm_depla.layers.fused.pays', lambda x, on_gpu: x.numel() >= on_gpu):
        for name in results['names']:
            model = create_model(name, args.img_size)
            x = random_images(args.batch_size, args.img_size)
            results[name] = dict(blocks=sum(isinstance(module, Depla) for module in model.modules()))
            for kind, call in zip(KINDS, (partial(_infer, model, x), partial(train_step, model, x, True)), strict=True):
                model.train(kind == 'training step')
                results[name][kind] = _count(along(name, call))
    return results


def render(results: Dict[str, Any]) -> str:
    base, rows = results[results['names'][-1]], []
    for name in results['names']:
        row: List[Any] = [f'`{name}`']
        for kind in KINDS:
            found, plain, blocks = results[name][kind], base[kind], results[name]['blocks']
            row += [
                f'{found["bytes"] / plain["bytes"]:.3f}', f'{found["seconds"] * 1000:.1f} ms',
                f'{found["seconds"] / plain["seconds"]:.3f}', found['kernels'],
                f'{(found["kernels"] - plain["kernels"]) / blocks:.1f}' if blocks else '',
                f'{found["kernels"] * LAUNCH * 1000:.1f} ms',
            ]  # fmt: skip
        rows.append(row)
    header = ['bytes', 'device time', 'ratio', 'kernels', 'more for each block', 'launches']
    about = f'Batch {results["batch_size"]} at {results["img_size"]} pixels. Ratios are to `{results["names"][-1]}`.'
    return f'{about}\n\n{table(["", *(f"{kind}: {name}" for kind in KINDS for name in header)], rows)}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    name, base = results['names'][0], results['names'][-1]
    found, plain = (results[model][KINDS[1]]['seconds'] for model in (name, base))
    on = f'`{base}`, batch {results["batch_size"]}, H100, counted'
    return [(f'least device time of a step of `{name}`', f'{found / plain:.3f}', on)]
