"""Everything that we want to know of a GPU, the most valuable first, in as many calls as it takes.

Each cell is recorded as it is measured. Another call with the same code, card and sizes goes on with what is missing;
it leaves out what would not end within `--minutes`. `train.py` is killed and resumed, and ends bit for bit as if it had
not been, or it does not. Models: channels last, bfloat16; inference, training step and memory over the base, in turn;
of the base itself the times. `blocks` is `compile_blocks`, `graphs` torch.compile with CUDA graphs. Detectors: two
images, as in the benchmark `neck`. Training: the recipe `better` on JPEGs of 500 x 375 pixels and about 80 kB, from
memory: images a second, and the share of the time in which they are waited for.
"""

import argparse
import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import numpy as np
import torch
from PIL import Image

from timm_depla import compile_blocks
from timm_depla.engine import training
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.classification.train import build
from timm_depla.engine.config import parse_args
from timm_depla.engine.device import set_up_device
from timm_depla.engine.distributed import setup_world
from timm_depla.layers import Depla

from . import neck, record, speed
from .crash import end, launch
from .differences import differences
from .pairs import median_interval, peak_memory, time_rounds
from .pipeline import write_images

Sizes = Dict[str, Any]
MODES = ('eager', 'blocks', 'compiled', 'graphs')
SECONDS = dict(tests=150, training=100, resuming=150, detector=60, eager=20, blocks=50, compiled=110, graphs=110)
SIZES = dict(
    models={
        'resnet50_depla': 'resnet50', 'seresnet50_depla': 'resnet50', 'resnet50_depla_adaptive': 'resnet50',
        'resnet50_depla+plain': 'resnet50', 'seresnet50': 'resnet50', 'fishnet150_depla': 'fishnet150',
        'resnet50:gca': 'resnet50', 'resnet50:nl': 'resnet50',
    },
    batches=(256, 32), img_size=224, pairs=20, backend='inductor',
    detectors=('maskrcnn_resnet50_fpn_depla', 'maskrcnn_resnet50_fpn'), height=800, width=1333,
    detector_kwargs={},
    images=1280, links=200, seconds=60,
)  # fmt: skip
TOY = dict(
    models={'test_resnet_depla': 'test_resnet'},
    batches=(4,), img_size=32, pairs=2, backend='eager',
    detectors=('maskrcnn_test_resnet_fpn_depla', 'maskrcnn_test_resnet_fpn'), height=64, width=96,
    detector_kwargs=dict(out_channels=16, box_batch_size_per_image=16),
    images=40, links=1, seconds=3,
)  # fmt: skip
FLAGS = dict(
    device=dict(choices=('cpu', 'cuda'), default='cuda'),
    minutes=dict(type=float, default=9, help='that this call may take'),
    toy=dict(action='store_true', default=False, help='tiny networks, to try the benchmark itself'),
)


def _compiler(mode: str, backend: str) -> Optional[Callable[[torch.nn.Module], Any]]:
    def only_blocks(model: torch.nn.Module) -> torch.nn.Module:
        has_blocks = any(isinstance(module, Depla) for module in model.modules())
        return compile_blocks(model, backend=backend) if has_blocks else model

    whole = partial(torch.compile, backend=backend)
    return dict(eager=None, blocks=only_blocks, compiled=whole, graphs=partial(whole, mode='reduce-overhead'))[mode]


def _over(samples: List[List[float]]) -> List[float]:
    """Seconds of the base, and the ratio of the model to it with its interval."""
    found = (statistics.median(row[-1] for row in samples), *median_interval([row[0] / row[-1] for row in samples]))
    return [float(f'{value:.4g}') for value in found]


def measure_model(args: argparse.Namespace, sizes: Sizes, what: str, batch: str, mode: str) -> Dict[str, Any]:
    x = torch.randn(int(batch), 3, sizes['img_size'], sizes['img_size'], device=args.device)
    x = x.to(memory_format=torch.channels_last)
    time = partial(time_rounds, rounds=sizes['pairs'], device=args.device)
    compiler = _compiler(mode, sizes['backend'])
    samples, memory = speed.measure([what, sizes['models'][what]], x, time, True, compiler)
    return dict({kind: _over(samples[kind]) for kind in speed.KINDS}, memory=memory)


def measure_detector(args: argparse.Namespace, sizes: Sizes, what: str, batch: str, mode: str) -> Dict[str, Any]:
    names, compiler = sizes['detectors'], _compiler(mode, sizes['backend'])
    kwargs = dict(height=sizes['height'], width=sizes['width'], device=args.device, **sizes['detector_kwargs'])
    detectors, image, target = neck.create_detectors(names, **kwargs)
    if compiler:
        compiler(detectors[0])
    found: Dict[str, Any] = {}
    for kind, function, inputs in (
        (speed.KINDS[0], neck._infer, [2 * [image]]),
        (speed.KINDS[1], neck._train_detector, [2 * [image], 2 * [target]]),
    ):
        calls = [partial(function, each.train(kind == speed.KINDS[1]), *inputs) for each in detectors]
        with torch.autocast('cuda', torch.bfloat16, enabled=args.device == 'cuda'):
            found[kind] = _over(time_rounds(calls, sizes['pairs'], args.device))
            memory = [peak_memory(call, args.device) for call in calls]
    return dict(found, memory=memory)


def _write_data(folder: Path, sizes: Sizes) -> Path:
    """Noise in the place of photographs, which scikit-image would have: coarse, and fine enough for 80 kB."""
    draw = np.random.default_rng(0)

    def noise(width: int, height: int) -> Image.Image:
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((1000, 750), Image.BICUBIC)

    photographs = [Image.blend(noise(20, 15), noise(250, 188), 0.4) for _ in range(10)]
    write_images(folder / 'data', sizes['images'], photographs)
    for file in list((folder / 'data' / 'train').glob('*/*.jpg')):
        for number in range(1, sizes['links']):
            file.with_name(f'{file.stem}-{number}.jpg').symlink_to(file)
    return folder / 'data'


def _flags(args: argparse.Namespace, sizes: Sizes, data: Path, mode: str) -> List[str]:
    model = next(iter(sizes['models']))
    flags = f'--recipe better --model {model} --img-size {sizes["img_size"]} --batch-size {sizes["batches"][0]} '
    flags += f'--device {args.device} --workers {os.cpu_count()} --channels-last --amp --amp-dtype bfloat16 '
    flags += '--warmup-epochs 0 ' + ('' if mode == 'eager' else f'--torchcompile {sizes["backend"]} ')
    return [str(data), '--output', str(data.parent), *flags.split()]


def measure_training(args: argparse.Namespace, sizes: Sizes, what: str, batch: str, mode: str) -> Dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        data = _write_data(Path(folder), sizes)
        train_args = parse_args(create_train_parser(), [*_flags(args, sizes, data, mode), '--no-deterministic'])
        world = setup_world(args.device)
        set_up_device(train_args, world)
        run, waits, ends = build(train_args, world), [], [time.perf_counter()]
        for images, targets in run.loader.epoch(0):
            waits.append(time.perf_counter() - ends[-1])
            run.state.losses.add(training.take_step(run, images, targets), len(images), str)
            ends.append(time.perf_counter())
            if ends[-1] - ends[0] > sizes['seconds']:
                break
        first = len(waits) // 3  # by then, kernels are chosen and compiled, and the loading processes have started
        seconds = ends[-1] - ends[first]
        rate = (len(waits) - first) * train_args.batch_size / seconds
        return dict(rate=round(rate, 1), waits=round(sum(waits[first:]) / seconds, 3), workers=train_args.workers)


def measure_resuming(args: argparse.Namespace, sizes: Sizes, what: str, batch: str, mode: str) -> Dict[str, Any]:
    """Names what differs of a run that was killed after its first checkpoint and one that was not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = _flags(args, sizes, _write_data(folder, dict(sizes, links=1)), mode)
        flags += ['--epochs', '2', '--recovery-interval', '2', '--resume', 'auto', '--workers', '2']

        def start(run: str) -> subprocess.Popen:
            return launch(['train.py', *flags, '--experiment', run], folder / f'{run}.log')

        with ExitStack() as stack:
            processes = {run: start(run) for run in ('whole', 'killed')}
            for process in processes.values():
                stack.callback(end, process, [])
            while processes['killed'].poll() is None and not list(folder.glob('killed/checkpoints/[0-9]*')):
                time.sleep(0.01)
            end(processes['killed'], [])
            processes['killed'] = start('killed')
            stack.callback(end, processes['killed'], [])
            for run, process in processes.items():
                if process.wait():
                    raise RuntimeError((folder / f'{run}.log').read_text()[-300:])
        if 'resuming from' not in (folder / 'killed.log').read_text():
            raise RuntimeError('the run ended before it was killed')
        return dict(differences=differences(folder / 'killed', folder / 'whole'))


def run_tests(args: argparse.Namespace, sizes: Sizes, what: str, batch: str, mode: str) -> Dict[str, Any]:
    command = [sys.executable, '-m', 'pytest', '-q', '-o', 'addopts=', '-p', 'no:cacheprovider', 'tests/test_gpu.py']
    lines = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True).stdout.splitlines()
    failed = [line for line in lines if line.startswith('FAILED')]
    return dict(outcome=re.sub(r' in .*', '', lines[-1].strip('= ')), failed=failed)


NOTHING = dict(card='No GPU yet', toy=False, cells={})  # results before the first call
FILLED_BY = dict(tests=run_tests, training=measure_training, resuming=measure_resuming, detector=measure_detector)


def plan(sizes: Sizes) -> Dict[str, str]:
    """The kind of each cell by its name, what/batch/mode, the most valuable first."""
    cells = {'tests/test_gpu.py//eager': 'tests'}
    models, batches = list(sizes['models']), sizes['batches']

    def add(mode: str, names: List[str]) -> None:
        cells.update({f'{name}/{batch}/{mode}': mode for batch in batches for name in names})

    def add_scripts(mode: str) -> None:
        cells.update({f'{kind}/{batches[0]}/{mode}': kind for kind in ('training', 'resuming')})

    add('eager', models)
    add_scripts('eager')
    add('compiled', models[:1])
    add_scripts('compiled')
    cells.update({f'{sizes["detectors"][0]}/2/{mode}': 'detector' for mode in ('eager', 'blocks')})
    add('blocks', models[:1])
    add('graphs', models[:1])
    for mode in MODES[1:]:
        add(mode, models)
    return cells


def _measure(args: argparse.Namespace, sizes: Sizes, cell: str, kind: str) -> Dict[str, Any]:
    torch.manual_seed(0)
    start = time.monotonic()
    try:
        found = FILLED_BY.get(kind, measure_model)(args, sizes, *cell.rsplit('/', 2))
    except Exception as error:  # such as memory that does not suffice: the other cells do not depend on it
        found = dict(error=(str(error).strip().splitlines() or [type(error).__name__])[-1][:200])
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    gc.collect()
    if args.device == 'cuda':
        torch.cuda.empty_cache()
    return dict(found, kind=kind, seconds=round(time.monotonic() - start, 1))


def run(args: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    """Yields the results after each cell."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('no CUDA GPU here: run this command on a machine with one, or try it by --device cpu --toy')
    end_time = time.monotonic() + 60 * args.minutes
    card = torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'
    results: Dict[str, Any] = dict(card=card, toy=args.toy, cells={})
    if args.record in record.names():
        found = record.load(args.record)
        if record.changes(found) == [] and all(found['results'][key] == results[key] for key in ('card', 'toy')):
            results = found['results']
    yield results
    sizes, cells = TOY if args.toy else SIZES, results['cells']
    todo = plan(sizes)
    again = [cell for cell in todo if 'error' in cells.get(cell, {})]
    for cell in [*(cell for cell in todo if cell not in cells), *again]:
        kind = todo[cell]
        longest = max((each['seconds'] for each in cells.values() if each['kind'] == kind), default=None)
        expected = longest or SECONDS[kind] / (20 if args.toy else 1)
        if time.monotonic() + expected > end_time:
            continue
        cells[cell] = _measure(args, sizes, cell, kind)
        print(cell, cells[cell], flush=True)
        yield results
    left = [cell for cell in todo if cell not in cells]
    print(f'{len(left)} of {len(todo)} cells are left: {", ".join(left)}' if left else 'every cell is filled')


def _text(found: Dict[str, Any]) -> str:
    if 'error' in found:
        return found['error'].replace('|', ' ')
    if 'outcome' in found:
        return '; '.join([found['outcome'], *found['failed']])
    if 'rate' in found:
        return f'{found["rate"]:.0f} images/s, {100 * found["waits"]:.0f}% waiting, {found["workers"]} processes'
    if 'differences' in found:
        return f'other {", ".join(found["differences"])}' if found['differences'] else 'the same bits'
    model, base = found['memory']
    return ', '.join(f'{ratio:.3f}' for ratio in (*(found[kind][1] for kind in speed.KINDS), model / base))


def _base_text(found: Dict[str, Any]) -> str:
    times = [f'{1000 * found[kind][0]:.1f} ms' for kind in speed.KINDS]
    return ', '.join([*times, f'{found["memory"][-1] / 2**30:.2f} GiB'])


def render(results: Dict[str, Any]) -> str:
    sizes, cells = TOY if results['toy'] else SIZES, results['cells']
    bases, planned, rows = dict([*sizes['models'].items(), sizes['detectors']]), plan(sizes), {}
    for row in dict.fromkeys(cell.rpartition('/')[0] for cell in planned):
        what, batch = row.rsplit('/', 1)
        found = {mode: cells.get(f'{row}/{mode}') for mode in MODES}
        empty = {mode: '' if f'{row}/{mode}' in planned else '-' for mode in MODES}
        rows[row] = [what, batch, *(_text(cell) if cell else empty[mode] for mode, cell in found.items())]
        if what in bases and f'{bases[what]}/{batch}' not in rows:
            texts = [_base_text(cell) if cell and 'memory' in cell else empty[mode] for mode, cell in found.items()]
            rows[f'{bases[what]}/{batch}'] = [bases[what], batch, *texts]
    missing = '' if planned.keys() <= cells.keys() else ' Empty: not measured yet.'
    return f'{results["card"]}.{missing}\n\n{record.table(["", "batch", *MODES], list(rows.values()))}'
