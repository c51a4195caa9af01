"""What a training image costs to load with the recipe `better`: CPU time by step, ours and the alternatives.

All loaders take turns in one process with one thread, on the JPEGs of `pipeline` in memory (DALI: on disk). timm is the
transforms and the collate function of its `train.py`, whose mixing happens here; ours mixes on the device. torchvision
is its transforms v2 on tensors, decoded by TorchCodec. DALI is NVIDIA's (`nvidia-dali-cuda120`) on the CPU alone. Both
have their own AutoAugment, bilinear interpolation, no mixing.
"""

import argparse
import io
import random
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from torch.utils.data import default_collate
from torchvision.transforms import v2

from timm_depla.engine.classification.train import build
from timm_depla.engine.distributed import setup_world
from timm_depla.engine.run import Run
from timm_depla.files import open_image

from .pairs import speed_text
from .pipeline import OURS_TORCH, write_images
from .record import table
from .throughput import PlainLoop, plan

SIZE = 224  # pixels
STEPS = ('decode', 'crop', 'flip', 'augment', 'convert', 'collate')
Seconds = Dict[str, float]  # by step
FLAGS = dict(pairs=40, batch_size=64)


def _step(transform: Callable) -> str:
    name = type(transform).__name__
    known = dict(Crop='crop', Flip='flip', Augment='augment', PIL='convert')
    return next(step for part, step in known.items() if part in name)


def in_steps(decode: Callable, transforms: Sequence[Callable], collate: Callable) -> Callable[[List[bytes]], Seconds]:
    """A function that loads a batch of files, and returns what each step takes of the processor."""

    def load(files: List[bytes]) -> Seconds:
        seconds: Seconds = defaultdict(float)

        def timed(name: str, step: Callable, *args: Any) -> Any:
            start = time.process_time()
            result = step(*args)
            seconds[name] += time.process_time() - start
            return result

        samples = []
        for data in files:
            image = timed('decode', decode, data)
            for transform in transforms:
                image = timed(_step(transform), transform, image)
            samples.append((image, 0))
        timed('collate', collate, samples)
        return seconds

    return load


def _decode(decode: Callable, file: bytes) -> Any:
    return decode(io.BytesIO(file), 'RGB')


def create_run(data: Path, batch_size: int, backend: str) -> Run:
    flags = [data, '--recipe', 'better', '--model', 'test_resnet_depla', '--img-size', SIZE, '--num-classes', 1000]
    flags += ['--workers', 0, '--batch-size', batch_size, '--resize-backend', backend]
    return build(plan(data.parent, *flags), setup_world('cpu'))


def load_by_dali(data: Path, batch_size: int) -> Callable[[List[bytes]], Seconds]:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import auto_augment

    in_turn = dict(num_threads=1, exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)

    @pipeline_def(enable_conditionals=True, batch_size=batch_size, device_id=None, seed=0, **in_turn)
    def pipeline() -> Tuple[Any, Any]:
        files, labels = fn.readers.file(file_root=str(data / 'train'), random_shuffle=True)
        images = fn.decoders.image_random_crop(files, random_area=[0.08, 1], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        return auto_augment.auto_augment_image_net(images, shape=(SIZE, SIZE)), labels

    loader = pipeline()

    def load(files: List[bytes]) -> Seconds:
        start = time.process_time()
        loader.run()
        return {'all': time.process_time() - start}

    return load


def batches(data: Path, batch_size: int) -> Iterator[List[bytes]]:
    """Files without end, in random order."""
    draw, paths = random.Random(0), sorted(data.glob('train/*/*.jpg'))
    while True:
        yield [path.read_bytes() for path in draw.sample(paths, batch_size)]


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from torchcodec.decoders import decode_jpeg

    torch.set_num_threads(1)  # as in a loading process
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, 'data')
        write_images(data, 640)
        timm = PlainLoop(create_run(data, args.batch_size, 'pil')).loader
        by_timm = timm.dataset.transform.transforms, timm.loader.collate_fn
        loaders = {'timm': in_steps(partial(_decode, open_image), *by_timm)}
        for name, backend in (('ours', 'pil'), (OURS_TORCH, 'torch')):
            ours = create_run(data, args.batch_size, backend).loader
            decode = partial(_decode, ours.dataset.decode)
            loaders[name] = in_steps(decode, ours.transform.transforms, ours.collate)
        crop = v2.RandomResizedCrop(SIZE, antialias=True)
        by_torchvision = [crop, v2.RandomHorizontalFlip(), v2.AutoAugment()], default_collate
        loaders['torchvision v2'] = in_steps(decode_jpeg, *by_torchvision)  # torchvision's own is deprecated
        if find_spec('nvidia') and find_spec('nvidia.dali'):
            loaders['DALI, on the CPU'] = load_by_dali(data, args.batch_size)
        samples: Dict[str, List[Seconds]] = {name: [] for name in loaders}
        files = batches(data, args.batch_size)
        for number in range(-3, args.pairs):
            batch = next(files)
            for name in loaders if number % 2 else reversed(loaders):
                random.seed(number)
                torch.manual_seed(number)
                seconds = loaders[name](batch)
                if number >= 0:
                    samples[name].append({step: 1000 * each / args.batch_size for step, each in seconds.items()})
    return dict(milliseconds=samples)


def _speeds(results: Dict[str, Any]) -> Dict[str, str]:
    """How much faster than timm each is."""
    totals = {name: [sum(batch.values()) for batch in found] for name, found in results['milliseconds'].items()}
    return {name: speed_text(totals['timm'], each) for name, each in totals.items()}


def render(results: Dict[str, Any]) -> str:
    samples, speeds, rows = results['milliseconds'], _speeds(results), []
    for name, found in samples.items():
        median = {step: statistics.median(batch[step] for batch in found) for step in found[0]}
        steps = [f'{median[step]:.2f}' if step in median else '' for step in STEPS]
        total = statistics.median(sum(batch.values()) for batch in found)
        rows.append([name, *steps, f'{total:.2f}', f'{1000 / total:.0f}', '1' if name == 'timm' else speeds[name]])
    header = ['milliseconds an image', *STEPS, 'in all', 'images a second and core', 'speed to timm (95% interval)']
    return f'{SIZE} pixels; medians of {len(samples["timm"])} batches.\n\n{table(header, rows)}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    speeds, on = _speeds(results), 'timm, on a core'
    names = {'ours': 'images loaded a second', OURS_TORCH: 'images loaded a second, `--resize-backend torch`'}
    return [(what, speeds[name], on) for name, what in names.items()]
