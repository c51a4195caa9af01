"""What torch.compile leaves to launch: kernels of a training step, counted on a CPU.

An eager kernel is an operation that PyTorch dispatches, as in the benchmark `bound`, in the form that a GPU takes for
batches like 32. Compiled, a kernel is a function that Inductor generates or a call of a library; the gradients of a
convolution count as two. Inductor's C++ functions hold what lies between two such calls; only a GPU can tell how many
Triton kernels it gets. All is under autocast to bfloat16, channels last. The block is the bottleneck, its own three
convolutions included. The time to compile is that of the first step without that of the second.
"""

import argparse
import copy
import re
import time
from functools import partial
from typing import Any, Callable, Dict, List
from unittest.mock import patch

import torch
from torch._inductor.utils import run_and_get_code

from timm_depla import compile_blocks
from timm_depla.layers import Depla
from timm_depla.models.resnet_depla import BottleneckDepla

from .bound import _count
from .record import table
from .speed import create_model, train_step

CALL = re.compile(r'^ +(?:\w+ = )?(cpp_fused\w*|extern_kernels\.\w+|(?:torch\.ops\.)?(?:aten|mkldnn)\.[\w.]+)\(', re.M)
FLAGS = dict(model='resnet50_depla', base='resnet50', batch_size=4, img_size=224)


def _launches(codes: List[str]) -> int:
    calls = [name for code in codes for name in CALL.findall(code.partition('def call(')[2])]
    return len(calls) + sum('convolution_backward' in name for name in calls)


def _compiled(step: Callable[[], None]) -> Dict[str, Any]:
    torch.compiler.reset()
    start = time.perf_counter()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(step)
    first = time.perf_counter() - start
    step()
    return dict(kernels=_launches(codes), seconds=round(2 * first - (time.perf_counter() - start), 1))


def _both(eager: Callable[[], None], compiled: Callable[[], None]) -> Dict[str, Any]:
    with patch('timm_depla.layers.fused.pays', lambda x, on_gpu: False):
        kernels = _count(eager)['kernels']
    return dict(eager=kernels, compiled=_compiled(compiled))


def _measure_block(block: torch.nn.Module, model: torch.nn.Module, x: torch.Tensor) -> Dict[str, Any]:
    given: List[torch.Tensor] = []
    with block.register_forward_pre_hook(lambda _, inputs: given.extend(inputs)):
        train_step(model, x, True)
    inputs = [each.detach().requires_grad_() for each in given]

    def step(block: torch.nn.Module) -> None:
        with torch.autocast('cpu', torch.bfloat16):
            out = block(*inputs)
        out.backward(torch.ones_like(out))

    return _both(partial(step, copy.deepcopy(block)), partial(step, compile_blocks(block)))


def run(args: argparse.Namespace) -> Dict[str, Any]:
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size).contiguous(memory_format=torch.channels_last)
    models = {name: create_model(name, args.img_size).train() for name in (args.model, args.base)}
    blocks = [each for each in models[args.model].modules() if isinstance(each, (BottleneckDepla, Depla))]
    results: Dict[str, Any] = dict(names=list(models), blocks=sum(isinstance(each, Depla) for each in blocks))
    for name, model in models.items():
        step = partial(train_step, x=x, amp=True)
        results[name] = _both(partial(step, model), partial(step, torch.compile(model)))
    return dict(results, block=_measure_block(blocks[0], models[args.model], x))


def render(results: Dict[str, Any]) -> str:
    block, rows = results['block'], []
    for name in ('block', *results['names']):
        found = results[name]
        left = {'block': block['compiled']['kernels'], results['names'][0]: found['eager']}.get(name, '')
        if name == results['names'][0]:
            left += results['blocks'] * (block['compiled']['kernels'] - block['eager'])
        kernels = ['' if name == 'block' else found['compiled']['kernels'], f'{found["compiled"]["seconds"]:.0f} s']
        rows.append(['a block' if name == 'block' else f'`{name}`', found['eager'], left, *kernels])
    return table(['kernels of a step', 'eager', 'blocks compiled', 'all compiled', 'time to compile'], rows)
