"""GPU-hours of the runs on ImageNet: estimates from what is on record, until an epoch has been measured.

An epoch of 1,281,167 images takes their number over the batch of a GPU, times a step. Of networks in the record `gpu`
of an H100 it is the step measured there, eager. Of others it is `resnet50`'s, measured on an H100 (in bfloat16, without
optimizer and input, at commit fa76970), times a counted ratio: of the bytes for a batch of 256, and of the kernels for
32, where launching them takes longest. Another card's step is that of an H100 times the ratio of their makers'
bandwidths. To feed a GPU takes as many cores as load its images a second by the record `feeding`.
"""

import argparse
import math
import statistics
from functools import cache
from typing import Any, Dict, Tuple

from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args

from .. import bound, record
from ..speed import IMAGENET

BANDWIDTHS = {'H100': bound.BANDWIDTH, 'RTX 4090': 1.008e12}  # bytes a second, by their maker
RESNET50 = {256: 0.0657, 32: 0.0302}  # seconds of a step on an H100, by the batch of the GPU
RECIPES = {  # those of the page, and whose step they take: the kept candidate is made, as in the plain form
    'imagenet_finetune': 'resnet50_depla+plain',
    'standard': 'resnet50_depla',
    'better': 'resnet50_depla',
}


@cache
def _results(name: str) -> Dict[str, Any]:
    return record.load(name)['results'] if name in record.names() else {}


@cache
def _counted(model: str, batch: int) -> Dict[str, float]:
    return bound.run(argparse.Namespace(model=[], base=model, batch_size=batch, img_size=224))[model]['training step']


def step_seconds(model: str, batch: int, card: str = 'H100') -> Tuple[float, str]:
    """Seconds of a step, and where they come from; of the batch whose step is known that is nearest."""
    known = min(RESNET50, key=lambda size: abs(math.log(size / batch)))
    measured = _results('gpu')
    cell = measured.get('cells', {}).get(f'{model}/{known}/eager', {}) if 'H100' in measured.get('card', '') else {}
    if 'training step' in cell:
        seconds, how = cell['training step'][0] * cell['training step'][1], 'measured on an H100'
    else:
        what = 'bytes' if known == 256 else 'kernels'
        ratio = round(_counted(model, known)[what] / _counted('resnet50', known)[what], 2)
        seconds, how = RESNET50[known] * ratio, f"{ratio:.2f} of resnet50's on an H100, by its {what}"
    if card != 'H100':
        ratio = round(BANDWIDTHS['H100'] / BANDWIDTHS[card], 2)
        seconds, how = seconds * ratio, f'{how}, times {ratio:.2f} for the bandwidth'
    return seconds * batch / known, how


def estimate(recipe: str, model: str, gpus: int, card: str = 'H100', batch_size: int = 256) -> Dict[str, Any]:
    """Hours of the recipe on so many GPUs of this kind that share a batch, with the arithmetic."""
    epochs = parse_args(create_train_parser(), ['--recipe', recipe]).epochs
    batch = max(batch_size // gpus, 1)
    seconds, how = step_seconds(model, batch, card)
    core = 1000 / statistics.median(sum(each.values()) for each in _results('feeding')['milliseconds']['ours'])
    hours = IMAGENET / batch * seconds / 3600  # of GPUs, for an epoch
    return dict(
        epoch=hours, all=epochs * hours, epochs=epochs, rate=batch / seconds, cores=math.ceil(batch / seconds / core),
        arithmetic=f'{IMAGENET:,} / {batch} steps x {1000 * seconds:.1f} ms ({how})',
    )  # fmt: skip


def render() -> str:
    """The table of docs/imagenet.md."""
    rows = []
    for recipe, model in RECIPES.items():
        for card, gpus in (('H100', 1), ('RTX 4090', 1), *([('H100', 8)] if recipe != 'imagenet_finetune' else [])):
            found = estimate(recipe, model, gpus, card)
            hours, cores = f'{found["all"] / gpus:.3g}', f'{found["cores"]} for {found["rate"]:.0f} images/s'
            rows.append([f'`{recipe}`', f'{gpus} {card}', found['epochs'], hours, cores, found['arithmetic']])
    header = ['recipe', 'GPUs', 'epochs', 'hours', 'cores for each GPU', 'an epoch, the GPUs added up']
    return record.table(header, rows)
