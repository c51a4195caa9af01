"""What DEPLA detects in the identity X, takes from the candidate Y, and where it puts it.

`capture` returns the maps of every block for any images. `timm-depla visualize IMAGE --model RUN` draws them
(as the paper's Figure 8), `timm-depla visualize FOLDER --model RUN --summary` measures them over a folder.
"""

import argparse
import io
import math
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from timm_depla.capture import BlockCapture, capture, capturing, find_blocks, measure, strength
from timm_depla.commands import run_command
from timm_depla.data import find_images
from timm_depla.detection import from_pretrained, is_detector
from timm_depla.detection.predict import read_image
from timm_depla.errors import ConfigError, as_config_error, require
from timm_depla.files import MODES, check_writable, write_file
from timm_depla.layers.linear import match_size
from timm_depla.loading import load_model

__all__ = ['BlockCapture', 'capture', 'capturing', 'draw_block', 'measure', 'strength', 'summarize']

UNIFORM = 0.99  # a group of higher entropy counts as uniform
PLACED = 1.5  # times uniform: a group whose peak is at least this places
DEAD = 0.01  # of the strongest group's strength: a weaker group counts as dead
_MIN_SIDE = 8  # pixels


def find_limit(*maps: Tensor) -> float:
    """The end of the colour scale of some maps: their strongest position, at least 2, where 1 is uniform."""
    return max(2.0, *(float(values.max()) for values in maps))


def show_map(place: Any, image: Tensor, values: Tensor, limit: float, title: str) -> Any:
    """Draw a map (h, w), 1 if uniform, over an image (3, H, W) from 0 to 1; returns what `colorbar` takes.

    The scale is logarithmic, from 1 / limit to limit. The title adds where each position is within a tenth of 1.
    """
    place.imshow(image.mean(0).cpu().numpy(), cmap='gray', vmin=0, vmax=1)
    place.set_title(f'{title}\nnearly uniform' if (values - 1).abs().max() < 0.1 else title, fontsize=9)
    place.set_axis_off()
    drawn = nn.functional.interpolate(values[None, None].float(), size=image.shape[1:], mode='bilinear')[0, 0]
    drawn = drawn.clamp(min=1 / limit).cpu().numpy()
    return place.imshow(drawn, cmap='RdBu_r', norm='log', vmin=1 / limit, vmax=limit, alpha=0.7)


def add_scale(figure: Any, drawn: Any, places: Any, limit: float, **options: Any) -> None:
    """Add the scale of some maps, with ticks at the uniform 1 and at powers of two, nine at most."""
    exponent = int(math.log2(limit))
    step = 1 + (exponent - 1) // 4
    ticks = [2.0**power for power in range(-(exponent // step) * step, exponent + 1, step)]
    labels = [f'{tick:g}' if tick >= 1 else f'1/{1 / tick:g}' for tick in ticks]
    bar = figure.colorbar(drawn, ax=places, **options)
    bar.set_ticks(ticks, labels=labels)
    bar.minorticks_off()
    bar.set_label('times an even spread', fontsize=9)


def draw_block(image: Tensor, block: BlockCapture, title: str = '', num_groups: int = 5) -> Any:
    """Draw one image in one block: features, and ROI maps and heatmaps of the strongest groups on one scale.

    Args:
        image: (3, H, W) from 0 to 1.
        block: Capture of this image.
        title: Title of the figure.
        num_groups: Groups to show, the strongest first.

    Returns:
        A matplotlib figure, without a window.
    """
    from matplotlib.figure import Figure

    groups = strength(block)[0].argsort(descending=True)[:num_groups]
    columns = max(len(groups), 5)
    figure = Figure(figsize=(2.1 * columns, 7.2), layout='constrained')
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(3, columns)
    for place in axes.flat:
        place.set_axis_off()
    axes[0, 0].imshow(image.permute(1, 2, 0).cpu().numpy())
    axes[0, 0].set_title('image', fontsize=9)
    change = block.output - match_size(block.identity, block.output, 'bilinear')
    features = (block.identity, block.candidate, change, block.output)
    names = ('comes in: X', 'is offered: Y', 'the block changes', 'goes out')
    for place, name, x in zip(axes[0, 1:], names, features, strict=False):
        energy = place.imshow(x[0].square().mean(0).sqrt().float().cpu().numpy(), cmap='viridis')
        bar = figure.colorbar(energy, ax=place, location='bottom', shrink=0.8, aspect=15)
        bar.ax.locator_params(nbins=3)
        place.set_title(name, fontsize=9)
    count = block.maps[0, 0, 0].numel()
    maps, heatmaps = block.maps[0, groups].mean(1) * count, block.heatmaps[0, groups] * count
    limit = find_limit(maps, heatmaps)
    for column, group in enumerate(groups.tolist()):
        show_map(axes[1, column], image, maps[column], limit, f'group {group} looks here')
        drawn = show_map(axes[2, column], image, heatmaps[column], limit, 'and writes back here')
    add_scale(figure, drawn, axes[1:], limit, location='bottom', shrink=0.5, aspect=50)
    return figure


def load_any(target: str) -> nn.Module:
    """Load a run, checkpoint, published folder or pretrained model, classifier or detector; ConfigError if none."""
    folder = Path(target.removeprefix('local-dir:'))
    if is_detector(folder):
        with as_config_error('', TypeError, ValueError):
            return from_pretrained(folder)
    return load_model(target).eval()


def prepare(model: nn.Module, pixels: Tensor, name: str = 'the image') -> Tuple[Tensor, Any]:
    """Convert an image, uint8 (3, H, W), to the one to show, (3, H, W) from 0 to 1, and to the model's input.

    ConfigError if it is too small.
    """
    height, width = pixels.shape[1:]
    if min(height, width) < _MIN_SIDE:
        raise ConfigError(f'{name} is {width} x {height} pixels: too small, give one of {_MIN_SIDE} a side or more')
    if not hasattr(model, 'pretrained_cfg'):  # a detector
        image = pixels / 255
        return image, [image]
    config = resolve_model_data_config(model)
    picture = to_pil_image(pixels).convert(MODES.get(config['input_size'][0], 'RGB'))
    x = create_transform(**config, is_training=False)(picture)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return (x * std + mean)[:3].clamp(0, 1).expand(3, -1, -1), x[None]


def read_input(model: nn.Module, file: Path) -> Tuple[Tensor, Any]:
    """Read an image file and `prepare` it; ConfigError if it is no image, or too small."""
    with as_config_error(f"cannot read '{file}' as an image: ", OSError):
        pixels = read_image(file)
    return prepare(model, pixels, f"'{file}'")


def summarize(model: nn.Module, files: Sequence[Path]) -> Dict[str, Dict[str, Tensor]]:
    """Means of `measure` over image files, (L,), by block."""
    found: Dict[str, Dict[str, List[Tensor]]] = {}
    for file in files:
        for name, block in capture(model, read_input(model, file)[1]).items():
            for key, value in measure(block).items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
    return {name: {key: torch.cat(v).mean(0) for key, v in values.items()} for name, values in found.items()}


def render_summary(totals: Dict[str, Dict[str, Tensor]]) -> str:
    """A Markdown table: a row for each block, over its groups."""
    lines = [
        '| block | entropy: mean (lowest to highest) | coverage | peak of ROI maps: median (groups that place) '
        '| of heatmaps | uniform groups | dead groups |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, values in totals.items():
        entropy, coverage, strengths = (values[key] for key in ('entropy', 'coverage', 'strength'))
        uniform = (entropy > UNIFORM).nonzero().flatten().tolist()
        dead = (strengths < DEAD * strengths.max()).nonzero().flatten().tolist()
        ranges = [f'{v.mean():.3f} ({v.min():.3f} to {v.max():.3f})' for v in (entropy, coverage)]
        for peaks in (values['map_peak'], values['heatmap_peak']):
            ranges.append(f'{peaks.median():.2f} ({(peaks >= PLACED).sum()} of {len(peaks)})')
        lists = [', '.join(map(str, groups)) or 'none' for groups in (uniform, dead)]
        lines.append(f'| `{name}` | {" | ".join(ranges + lists)} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('image', metavar='IMAGE|FOLDER', help='an image, or with --summary a folder of images')
    parser.add_argument('--model', required=True, metavar='RUN|MODEL', help='a run, a checkpoint or a pretrained model')
    parser.add_argument('--block', default='', metavar='NAME', help='the DEPLA block (default: the last)')
    parser.add_argument('--out', default='depla.png', metavar='FILE', help='the figure to write (default: depla.png)')
    parser.add_argument('--summary', action='store_true', help='measure the maps of all blocks over a folder')
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Run the command; ConfigError if the model or the image does not load, or there is no such block."""
    model = load_any(args.model)
    with as_config_error(f"'{args.model}': "):
        blocks = find_blocks(model)
    if args.summary:
        files = find_images(args.image)
        print(f'{len(files)} images\n\n{render_summary(summarize(model, files))}', end='')
        return
    require('matplotlib', 'plot')
    is_writing = f"cannot write --out '{args.out}': ", OSError, ValueError
    with as_config_error(*is_writing):
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        check_writable(Path(args.out))
    name = args.block or list(blocks)[-1]
    if name not in blocks:
        raise ConfigError(f"no block '{name}'; there are {', '.join(blocks)}")
    image, x = read_input(model, Path(args.image))
    title = f'{args.model}, block {name}, T = {blocks[name].rpn.temperature:g}'
    figure = draw_block(image, capture(model, x)[name], title)
    with as_config_error(*is_writing):
        data = io.BytesIO()
        figure.savefig(data, format=Path(args.out).suffix[1:] or None, dpi=100)
        write_file(Path(args.out), data.getvalue())
    print(args.out)


if __name__ == '__main__':
    run_command('timm_depla.visualize', main)
