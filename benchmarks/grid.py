"""The price of DEPLA by model and batch size: time and memory of each model over its base, in turn in one process.

Each cell takes turns of the model and its base for about as long, five turns at least. A training step is forward and
backward. `compiled` is by torch.compile, which on a CPU needs a C++ compiler; `onnx` is the exported model in
onnxruntime, with as many threads as PyTorch; `bf16` is under autocast to bfloat16. Memory is that of the benchmark
`speed`.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch

from timm_depla.engine.distributed import keep_memory

from .pairs import median_interval, peak_memory, ratio_text, time_rounds
from .record import table
from .speed import KINDS, along, create_model, infer, train_step

BASES = {
    'resnet50_depla': 'resnet50',
    'resnet50_depla_adaptive': 'resnet50',
    'seresnet50_depla': 'seresnet50',
    'regnety_040_depla': 'regnety_040',
    'fishnet150_depla': 'fishnet150',
    'test_resnet_depla': 'test_resnet',
}
MODES = ('eager', 'compiled', 'onnx', 'bf16')


def add_args(parser: argparse.ArgumentParser) -> None:
    models = [model for model in BASES if not model.startswith('test_')]
    parser.add_argument('--model', nargs='+', default=models, choices=BASES, metavar='MODEL', help='models to time')
    parser.add_argument('--batch-size', nargs='+', type=int, default=[1, 4, 8, 32], help='images')
    parser.add_argument('--path', nargs='*', default=[], metavar='PATH', help='forms of each model, see `speed`')
    parser.add_argument('--contiguous', action='store_true', help='models and images in contiguous format')
    parser.add_argument('--img-size', type=int, default=224, help='pixels')
    parser.add_argument('--mode', choices=MODES, default='eager')
    parser.add_argument('--seconds', type=float, default=30, help='time for each cell of the table')


def export(model: torch.nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """The model as a function of its inputs in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.onnx')
        torch.onnx.export(model.eval(), (x,), dynamo=True).save(path)
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


def _time(calls: List[Callable[[], Any]], seconds: float) -> List[List[float]]:
    calls[-1]()
    start = time.perf_counter()
    calls[-1]()
    turn = len(calls) * (time.perf_counter() - start)
    return time_rounds(calls, max(round(seconds / turn) - 3, 5))


def measure(name: str, batch_size: int, args: argparse.Namespace) -> Dict[str, Any]:
    """Seconds (path of the model, base) of each turn by kind, and the peak memory of a training step, by path."""
    specs = [name, *(f'{name}+{path}' for path in args.path), BASES[name]]
    models = [create_model(spec, args.img_size) for spec in specs]
    x = torch.randn(batch_size, 3, args.img_size, args.img_size).to(memory_format=torch.channels_last)
    if args.contiguous:
        models, x = [model.to(memory_format=torch.contiguous_format) for model in models], x.contiguous()
    if args.mode == 'onnx':
        sessions = [export(model, x) for model in models]
        return _split(specs, {KINDS[0]: _time([partial(session, x) for session in sessions], args.seconds)})
    called = [torch.compile(model) if args.mode == 'compiled' else model for model in models]
    amp, cell = args.mode == 'bf16', {}
    for kind in KINDS:
        for model in models:
            model.train(kind == KINDS[1])
        calls = [partial(train_step if kind == KINDS[1] else infer, model, x, amp) for model in called]
        calls = [along(spec, call) for spec, call in zip(specs, calls, strict=True)]
        cell[kind] = _time(calls, args.seconds)
    state = [sum(tensor.nbytes for tensor in model.state_dict().values()) for model in models]
    for model in models:
        model.zero_grad()
    cell['memory'] = [peak_memory(call) + size for call, size in zip(calls, state, strict=True)]
    return _split(specs, cell)


def _split(specs: List[str], cell: Dict[str, Any]) -> Dict[str, Any]:
    """The cell of each model with the base's beside it, by model."""
    pairs: Dict[str, Any] = {spec: {} for spec in specs[:-1]}
    for i, spec in enumerate(specs[:-1]):
        for kind, values in cell.items():
            one = kind == 'memory'
            pairs[spec][kind] = [values[i], values[-1]] if one else [[sample[i], sample[-1]] for sample in values]
    return pairs


def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    keep_memory()
    cells = {}
    for name in args.model:
        for batch_size in args.batch_size:
            torch.compiler.reset()
            for spec, cell in measure(name, batch_size, args).items():
                cells[f'{spec}/{batch_size}'] = cell
                print(*_row(f'{spec}/{batch_size}', cell), flush=True)
    return dict(mode=args.mode, img_size=args.img_size, contiguous=args.contiguous, cells=cells)


def _row(key: str, cell: Dict[str, Any]) -> List[str]:
    name, batch_size = key.split('/')
    ratios = [ratio_text([a / b for a, b in cell[kind]]) if kind in cell else '' for kind in KINDS]
    memory = f'{cell["memory"][0] / cell["memory"][1]:.3f}' if 'memory' in cell else ''
    return [f'`{name}`', batch_size, *ratios, memory]


def render(results: Dict[str, Any]) -> str:
    rows = [_row(key, cell) for key, cell in results['cells'].items()]
    header = ['', 'batch', 'inference', 'training step', 'peak memory of a step']
    memory_format = 'contiguous' if results.get('contiguous') else 'channels last'
    return (
        f'{results["img_size"]} pixels, {memory_format}, CPU, {results["mode"]}. Ratios to the base by pair: median '
        '(95% interval).\n\n' + table(header, rows)
    )


def plot(results: Dict[str, Any]) -> Any:
    """The ratios by batch size, a line for each model."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(key.split('/')[0] for key in results['cells']))
    figure = Figure(figsize=(9, 3.2), layout='constrained')
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        for name in names:
            cells = {
                int(key.split('/')[1]): cell for key, cell in results['cells'].items() if key.startswith(f'{name}/')
            }
            found = [median_interval([a / b for a, b in cell[kind]]) for cell in cells.values()]
            middles, lows, highs = zip(*found, strict=True)
            errors = [
                [m - low for m, low in zip(middles, lows, strict=True)],
                [high - m for m, high in zip(middles, highs, strict=True)],
            ]
            axes.errorbar(list(cells), middles, yerr=errors, marker='o', markersize=4, capsize=2, label=name)
        axes.axhline(1, color='0.7', linewidth=1)
        axes.set_xscale('log', base=2)
        axes.set_xticks(list(cells), list(cells))
        axes.set_xlabel('batch size')
        axes.set_title(kind)
    figure.axes[0].set_ylabel('time over that of the base')
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=len(names))
    return figure
