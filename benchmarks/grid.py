"""The price of DEPLA by model and batch size: `speed` for each, over the model's own base.

A cell takes turns for about `--seconds`, five at least. `compiled` is by torch.compile, which on a CPU needs a C++
compiler. `onnx` is the exported model in ONNX Runtime. `bf16` is under autocast to bfloat16.
"""

import argparse
import time
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import torch

from .deploy import onnxruntime
from .pairs import ratio_text, time_rounds
from .record import table
from .speed import KINDS, create_model, measure, random_images, trained

MODELS = ['resnet50_depla', 'resnet50_depla_adaptive', 'seresnet50_depla', 'regnety_040_depla', 'fishnet150_depla']
MODES = ('eager', 'compiled', 'onnx', 'bf16')
FLAGS = dict(
    model=MODELS, batch_size=[1, 4, 8, 32], path=[], img_size=224,
    mode=dict(choices=MODES, default='eager'),
    seconds=dict(type=float, default=30, help='time for each cell of the table'),
)  # fmt: skip


def _time(calls: List[Callable[[], Any]], seconds: float) -> List[List[float]]:
    calls[-1]()
    start = time.perf_counter()
    calls[-1]()
    turn = len(calls) * (time.perf_counter() - start)
    return time_rounds(calls, max(round(seconds / turn) - 3, 5))


def _measure(name: str, batch_size: int, args: argparse.Namespace) -> Dict[str, Dict[str, Any]]:
    """By form of a model: its seconds and its base's in each turn by kind, and the memory of a step of both."""
    specs = [name, *(f'{name}+{path}' for path in args.path), name.split('_depla')[0]]
    x = random_images(batch_size, args.img_size)
    turns = partial(_time, seconds=args.seconds)
    if args.mode == 'onnx':
        models = [create_model(spec, args.img_size).eval() for spec in specs]
        samples, memory = {KINDS[0]: turns([partial(onnxruntime(model, [x]), x) for model in models])}, []
    else:
        compiler = torch.compile if args.mode == 'compiled' else None
        samples, memory = measure(specs, x, turns, args.mode == 'bf16', compiler)
    cells: Dict[str, Dict[str, Any]] = {spec: {} for spec in specs[:-1]}
    for kind, columns in zip(KINDS, (specs, trained(specs)), strict=True):
        for column, spec in enumerate(columns[:-1] if kind in samples else []):
            cells[spec][kind] = [[row[column], row[-1]] for row in samples[kind]]
    for spec, size in zip(trained(specs), memory[:-1], strict=False):
        cells[spec]['memory'] = [size, memory[-1]]
    return cells


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    cells = {}
    for name in args.model:
        for batch_size in args.batch_size:
            torch.compiler.reset()
            cells.update({f'{spec}/{batch_size}': cell for spec, cell in _measure(name, batch_size, args).items()})
            print(name, batch_size, ratio_text(cells[f'{name}/{batch_size}'][KINDS[0]]), flush=True)
    return dict(mode=args.mode, img_size=args.img_size, cells=cells)


def _ratio(results: Dict[str, Any], spec: str, batch_size: Any, kind: str) -> str:
    """A ratio of the table; '' where it is not measured, as a training step of a model that is fused for inference."""
    cell = results['cells'].get(f'{spec}/{batch_size}', {})
    is_there = kind in cell and (kind == KINDS[0] or not spec.endswith('+fused'))
    return ratio_text(cell[kind]) if is_there else ''


def render(results: Dict[str, Any]) -> str:
    specs = [key.split('/') for key in results['cells']]
    keys = list(dict.fromkeys((spec.split('+')[0], batch) for spec, batch in specs))
    columns = {}
    for kind in (*KINDS, 'memory'):
        for plus, path in dict.fromkeys(spec.partition('+')[1:] for spec, _ in specs):
            column = [_ratio(results, name + plus + path, batch, kind) for name, batch in keys]
            if any(column):
                columns[f'{kind}, {path}' if path else kind] = column
    rows = [[f'`{name}`', batch, *cells] for (name, batch), *cells in zip(keys, *columns.values(), strict=True)]
    about = f'{results["img_size"]} pixels, CPU, {results["mode"]}: ratios to the base, median (95% interval).'
    return f'{about}\n\n{table(["", "batch", *columns], rows)}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    """The forms of ResNet-50 at batch 8, where they are measured."""
    if results['mode'] not in ('eager', 'compiled'):
        return []
    name, how = 'resnet50_depla', ', compiled' if results['mode'] == 'compiled' else ''
    wanted = [(name, f'training step of `{name}`{how}', KINDS[1])]
    if _ratio(results, f'{name}+fused', 8, KINDS[0]):
        wanted += [
            (name, f'inference of `{name}`', KINDS[0]),
            (f'{name}+fused', f'inference of `{name}`, reparameterized', KINDS[0]),
            (name, f'memory of a step of `{name}`', 'memory'),
            ('fishnet150_depla', 'training step of `fishnet150_depla`', KINDS[1]),
        ]
    return [
        (what, ratio, f'`{spec.split("_depla")[0]}`, batch 8, CPU')
        for spec, what, kind in wanted
        if (ratio := _ratio(results, spec, 8, kind))
    ]
