"""Reading and augmenting images: our training against a plain loop of timm's parts, with the recipe `better`.

The images are JPEGs like ImageNet's average, 500 x 375 pixels at quality 90, cropped at random from ten photographs of
scikit-image and scikit-learn; each photograph is a class. Loading means an epoch's batches as the loading processes
give them, decoded, cropped and augmented by AutoAugment: what feeds a GPU, which does the rest. Input means with the
rest on the CPU, mixed and normalised, without training. The loops are those of the benchmark `throughput`.
`--resize-backend torch` keeps the crops, interpolations and all random numbers; TorchCodec decodes the files to the
same pixels, and PyTorch resizes them.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
from PIL import Image
from timm.data import create_transform

from timm_depla.data import TensorResizedCrop
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.classification.train import build
from timm_depla.engine.config import parse_args
from timm_depla.engine.device import set_up_device
from timm_depla.engine.distributed import setup_world

from .pairs import ratio_text
from .record import table
from .throughput import PlainLoop, race, serve_ours, serve_plain

SIZE, QUALITY = (500, 375), 90
FILES = ('astronaut', 'coffee', 'chelsea', 'rocket', 'retina', 'ihc', 'hubble_deep_field', 'motorcycle_left')


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', default='test_resnet_depla', help='model of the loops')
    parser.add_argument('--img-size', type=int, default=224, help='image size in pixels')
    parser.add_argument('--images', type=int, default=1280, help='training images; a quarter as many for validation')
    parser.add_argument('--epochs', type=int, default=10, help='epochs of each')
    parser.add_argument('--batch-size', type=int, default=64, help='images')


def load_photographs() -> List[Image.Image]:
    """The photographs that the images are cut from."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.data.__file__).parent
    files = [next(folder.glob(f'{name}.*')) for name in FILES]
    return [Image.open(file).convert('RGB') for file in files] + [
        Image.fromarray(pixels) for pixels in load_sample_images().images
    ]


def write_images(folder: Path, images: int) -> None:
    """Write FOLDER/SPLIT/CLASS/*.jpg: windows of at least half a photograph's side."""
    draw = random.Random(0)
    for label, photograph in enumerate(load_photographs()):
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


def serve_plain_loading(train_args: argparse.Namespace, pipe: Any) -> None:
    loader = PlainLoop(build(train_args, setup_world('cpu'))).loader.loader
    _serve(pipe, lambda epoch: loader)


def serve_our_loading(train_args: argparse.Namespace, pipe: Any) -> None:
    loader = build(train_args, setup_world('cpu')).loader.ahead

    def epoch(number: int) -> Any:
        loader.seek(number, 0)
        return loader

    _serve(pipe, epoch)


def serve_plain_input(train_args: argparse.Namespace, pipe: Any) -> None:
    loader = PlainLoop(build(train_args, setup_world('cpu'))).loader
    _serve(pipe, lambda epoch: loader)


def serve_our_input(train_args: argparse.Namespace, pipe: Any) -> None:
    world = setup_world('cpu')
    set_up_device(train_args, world)
    _serve(pipe, build(train_args, world).loader.epoch)


def _serve(pipe: Any, epoch: Any) -> None:
    total = 0
    while (number := pipe.recv()) is not None:
        start = time.perf_counter()
        total += sum(len(images) for images, _ in epoch(number))
        pipe.send((time.perf_counter() - start, 0.0))
    pipe.send((total, []))


def run(args: argparse.Namespace) -> Dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, 'data')
        write_images(data, args.images)
        flags = [str(data), '--recipe', 'better', '--model', args.model, '--img-size', str(args.img_size)]
        flags += ['--num-classes', '10', '--batch-size', str(args.batch_size), '--epochs', str(args.epochs)]
        flags += ['--warmup-epochs', '1', '--workers', '2', '--device', 'cpu']
        results: Dict[str, Any] = {}
        for kind, plain, ours in (
            ('loading', serve_plain_loading, serve_our_loading),
            ('input', serve_plain_input, serve_our_input),
            ('loop', serve_plain, serve_ours),
        ):
            arms = {}
            for name, serve, more in (
                ('plain', plain, []),
                ('ours', ours, []),
                ('ours, --resize-backend torch', ours, ['--resize-backend', 'torch']),
            ):
                experiment = f'{kind}-{len(arms)}'
                (output := Path(folder, experiment)).mkdir()  # where the plain loop saves
                argv = [*flags, '--output', str(output), '--experiment', 'run', *more]
                train_args = parse_args(create_train_parser(), argv)
                arms[name] = (serve, train_args)
            raced = race(arms, args.epochs)
            images = {name: seen[0] for name, seen in raced['seen'].items()}
            results[kind] = dict(training=raced['training'], top1=raced['top1'], images=images)
    return dict(results, pixels=pixel_changes(), size=args.img_size, model=args.model)


def render(results: Dict[str, Any]) -> str:
    rows = []
    named = dict(loading='loading alone', input='input', loop=f'training `{results["model"]}`')
    for kind, what in named.items():
        result = results[kind]
        plain = result['training']['plain'][1:]
        for name, seconds in result['training'].items():
            rate = result['images'][name] / len(seconds) / statistics.median(seconds[1:])
            ratio = ratio_text([a / b for a, b in zip(plain, seconds[1:], strict=True)]) if name != 'plain' else '1'
            top1 = f'{result["top1"][name]:.2f}' if kind == 'loop' else ''
            rows.append([what, name, f'{rate:.0f}', ratio, top1])
    pixels = results['pixels']
    header = ['', '', 'images a second', 'ratio to plain by epoch: median (95% interval)', 'last top-1']
    return (
        f'{results["size"]} pixels, two loading processes, {len(plain)} epochs in turn after one to warm up.\n\n'
        + table(header, rows)
        + f'\n\nWith `--resize-backend torch`, {100 * pixels["share"]:.2f}% of the values of a crop change, by at most '
        f'{pixels["largest"]} of 255.'
    )
