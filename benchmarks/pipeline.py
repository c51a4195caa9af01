"""Reading and augmenting images with the recipe `better`: ours over a plain loop of timm's parts.

The images are JPEGs like ImageNet's average, 500 x 375 pixels at quality 90, cut from ten photographs of scikit-image
and scikit-learn, a class each. Loading is an epoch's batches as two processes give them, decoded, cropped and
augmented: what feeds a GPU. Input is with the rest on the CPU, mixed and normalised. Training is that of `throughput`.
With `--resize-backend torch`, TorchCodec decodes to the same pixels, and PyTorch resizes them.
"""

import argparse
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from PIL import Image
from timm.data import create_transform

from timm_depla.data import TensorResizedCrop
from timm_depla.engine.classification.train import build
from timm_depla.engine.device import set_up_device
from timm_depla.engine.distributed import setup_world

from .pairs import speed_text
from .record import table
from .throughput import Loop, PlainLoop, plan, race, start_ours, start_plain

SIZE, QUALITY = (500, 375), 90
PARTS = dict(loading='loading alone', input='input', loop='training')
OURS_TORCH = 'ours, --resize-backend torch'
FILES = ('astronaut', 'coffee', 'chelsea', 'rocket', 'retina', 'ihc', 'hubble_deep_field', 'motorcycle_left')
FLAGS = dict(
    model='test_resnet_depla', img_size=224, epochs=10, batch_size=64,
    images=dict(type=int, default=1280, help='training images; a quarter as many for validation'),
)  # fmt: skip


def load_photographs() -> List[Image.Image]:
    """The photographs that the images are cut from."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.data.__file__).parent
    files = [next(folder.glob(f'{name}.*')) for name in FILES]
    return [Image.open(file).convert('RGB') for file in files] + [
        Image.fromarray(pixels) for pixels in load_sample_images().images
    ]


def write_images(folder: Path, images: int, photographs: Sequence[Image.Image] = ()) -> None:
    """Write FOLDER/SPLIT/CLASS/*.jpg: windows of at least half a photograph's side."""
    draw = random.Random(0)
    for label, photograph in enumerate(photographs or load_photographs()):
        for split, count in (('train', images // 10), ('validation', images // 40)):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                width = min(photograph.width, photograph.height * SIZE[0] / SIZE[1]) * draw.uniform(0.5, 1)
                height = width * SIZE[1] / SIZE[0]
                left, top = draw.uniform(0, photograph.width - width), draw.uniform(0, photograph.height - height)
                window = photograph.resize(SIZE, Image.BICUBIC, box=(left, top, left + width, top + height))
                window.save(folder / split / str(label) / f'{i}.jpg', quality=QUALITY)


def pixel_changes(rounds: int = 100) -> Dict[str, float]:
    """Difference of crops resized by Pillow and by PyTorch: the largest, and the share of values that differ."""
    transform = create_transform((3, 224, 224), is_training=True, interpolation='random', use_prefetcher=True)
    crop, convert = transform.transforms[0], transform.transforms[-1]  # the latter to a tensor, if it is none
    largest, different = 0, []
    for photograph in load_photographs():
        for seed in range(rounds // 10):
            crops = []
            for resized_crop in (crop, TensorResizedCrop(crop)):
                random.seed(seed)
                crops.append(np.asarray(convert(resized_crop(photograph)), dtype=int))
            difference = np.abs(crops[0] - crops[1])
            largest = max(largest, int(difference.max()))
            different.append(float((difference > 0).mean()))
    return dict(largest=largest, share=statistics.mean(different))


def _start_loader(part: str, name: str, args: argparse.Namespace) -> Loop:
    """The loading of a loop alone, or its input."""
    world, counts = setup_world('cpu'), []
    if name == 'ours':
        set_up_device(args, world)
    run = build(args, world)
    loader = PlainLoop(run).loader if name == 'plain' else run.loader

    def batches(number: int) -> Any:
        if name == 'plain':
            return loader if part == 'input' else loader.loader
        if part == 'input':
            return loader.epoch(number)
        loader.ahead.seek(number, 0)
        return loader.ahead

    def epoch(number: int) -> Tuple[float, float]:
        start = time.perf_counter()
        counts.append(sum(len(images) for images, _ in batches(number)))
        return time.perf_counter() - start, 0.0

    return epoch, lambda: (sum(counts), [])


def run(args: argparse.Namespace) -> Dict[str, Any]:
    results: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, 'data')
        write_images(data, args.images)
        flags = [data, '--recipe', 'better', '--model', args.model, '--img-size', args.img_size, '--num-classes', 10]
        flags += ['--batch-size', args.batch_size, '--epochs', args.epochs, '--warmup-epochs', 1]
        for part in PARTS:
            plain, ours = start_plain, start_ours
            if part != 'loop':
                plain, ours = (partial(_start_loader, part, name) for name in ('plain', 'ours'))
            loops = {
                name: partial(start, plan(Path(folder, f'{part}-{name}'), *flags, *more))
                for name, start, more in (
                    ('plain', plain, []),
                    ('ours', ours, []),
                    (OURS_TORCH, ours, ['--resize-backend', 'torch']),
                )
            }
            raced = race(loops, args.epochs)
            images = {name: seen[0] for name, seen in raced['seen'].items()}
            results[part] = dict(training=raced['training'], top1=raced['top1'], images=images)
    return dict(results, pixels=pixel_changes(), size=args.img_size, model=args.model)


def render(results: Dict[str, Any]) -> str:
    rows, pixels = [], results['pixels']
    for part, what in PARTS.items():
        times, images, row = results[part]['training'], results[part]['images'], [what]
        for name, seconds in times.items():
            row.append(f'{images[name] / len(seconds) / statistics.median(seconds[1:]):.0f}')
            row += [] if name == 'plain' else [speed_text(times['plain'][1:], seconds[1:])]
        rows.append(row)
    header = ['images a second', 'plain', 'ours', 'ratio by epoch', OURS_TORCH, 'ratio by epoch']
    top1 = ', '.join(f'{score:.2f} {name}' for name, score in sorted(results['loop']['top1'].items()))
    return (
        f'{results["size"]} pixels, `{results["model"]}`, {len(seconds) - 1} epochs in turn after one to warm up. '
        f'Last top-1: {top1}. With `--resize-backend torch`, {100 * pixels["share"]:.2f}% of '
        f'the values of a crop change, by at most {pixels["largest"]} of 255.\n\n' + table(header, rows)
    )


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    times, on = results['loop']['training'], f"a plain loop of timm's parts, {results['size']} pixels"
    return [('speed of training from JPEGs', speed_text(times['plain'][1:], times['ours'][1:]), on)]
