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
from .flags import add_flags
from .pairs import ratio_text, time_rounds
from .record import table
from .speed import KINDS, create_model, measure, trained

MODELS = ['resnet50_depla', 'resnet50_depla_adaptive', 'seresnet50_depla', 'regnety_040_depla', 'fishnet150_depla']
MODES = ('eager', 'compiled', 'onnx', 'bf16')


def add_args(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, model=MODELS, batch_size=[1, 4, 8, 32], path=[], img_size=224)
    parser.add_argument('--mode', choices=MODES, default='eager')
    parser.add_argument('--seconds', type=float, default=30, help='time for each cell of the table')


def _base(name: str) -> str:
    return name.split('_depla')[0]


def _time(calls: List[Callable[[], Any]], seconds: float) -> List[List[float]]:
    calls[-1]()
    start = time.perf_counter()
    calls[-1]()
    turn = len(calls) * (time.perf_counter() - start)
    return time_rounds(calls, max(round(seconds / turn) - 3, 5))


def _measure(name: str, batch_size: int, args: argparse.Namespace) -> Dict[str, Dict[str, Any]]:
    """By form of a model: its seconds and its base's in each turn by kind, and the memory of a step of both."""
    specs = [name, *(f'{name}+{path}' for path in args.path), _base(name)]
    x = torch.randn(batch_size, 3, args.img_size, args.img_size).to(memory_format=torch.channels_last)
    turns = partial(_time, seconds=args.seconds)
    if args.mode == 'onnx':
        models = [create_model(spec, args.img_size).eval() for spec in specs]
        samples, memory = {KINDS[0]: turns([partial(onnxruntime(model, [x]), x) for model in models])}, []
    else:
        samples, memory = measure(
            specs, x, turns, args.mode == 'bf16', torch.compile if args.mode == 'compiled' else None
        )
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


def _ratio(cells: Dict[str, Dict[str, Any]], name: str, batch_size: str, kind: str) -> str:
    """A ratio of the table; '' where it is not measured, as a training step of a model that is fused for inference."""
    cell = cells.get(f'{name}/{batch_size}', {})
    if kind not in cell or (kind != KINDS[0] and name.endswith('+fused')):
        return ''
    return f'{cell[kind][0] / cell[kind][1]:.3f}' if kind == 'memory' else ratio_text(cell[kind])


def render(results: Dict[str, Any]) -> str:
    cells = results['cells']
    keys = list(dict.fromkeys((key.split('/')[0].split('+')[0], key.split('/')[1]) for key in cells))
    paths = list(dict.fromkeys(key.split('/')[0].partition('+')[2] for key in cells))
    columns = [
        (kind, path)
        for kind in (*KINDS, 'memory')
        for path in paths
        if any(_ratio(cells, f'{name}+{path}' if path else name, batch, kind) for name, batch in keys)
    ]
    rows = [
        [
            f'`{name}`',
            batch,
            *(_ratio(cells, f'{name}+{path}' if path else name, batch, kind) for kind, path in columns),
        ]
        for name, batch in keys
    ]
    header = ['', 'batch', *(f'{kind}, {path}' if path else kind for kind, path in columns)]
    return (
        f'{results["img_size"]} pixels, CPU, {results["mode"]}: ratios to the base, median (95% interval).\n\n'
        + table(header, rows)
    )


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    """The forms of ResNet-50 at batch 8, where they are measured."""
    cells, name = results['cells'], 'resnet50_depla'
    if f'{name}/8' not in cells or results['mode'] not in ('eager', 'compiled'):
        return []
    how, on = ', compiled' if results['mode'] == 'compiled' else '', f'`{_base(name)}`, batch 8, CPU'
    found = [(f'training step of `{name}`{how}', _ratio(cells, name, '8', KINDS[1]), on)]
    if fused := _ratio(cells, f'{name}+fused', '8', KINDS[0]):
        found.append((f'inference of `{name}`', _ratio(cells, name, '8', KINDS[0]), on))
        found.append((f'inference of `{name}`, reparameterized', fused, on))
        found.append((f'memory of a step of `{name}`', _ratio(cells, name, '8', 'memory'), on))
        step = _ratio(cells, 'fishnet150_depla', '8', KINDS[1])
        found.append(('training step of `fishnet150_depla`', step, '`fishnet150`, batch 8, CPU'))
    return found
