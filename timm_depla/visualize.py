"""What DEPLA detects in the identity X, takes from the candidate Y, and where it puts it.

`capture` returns the maps of every block for any images. `python -m timm_depla.visualize IMAGE --model RUN` draws them
(as the paper's Figure 8), `python -m timm_depla.visualize FOLDER --model RUN --summary` measures them over a folder.
"""

import argparse
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from timm_depla.detection import from_pretrained, is_detector
from timm_depla.detection.predict import read_image
from timm_depla.engine.errors import ConfigError, require
from timm_depla.engine.models import load_model
from timm_depla.engine.world import run_command
from timm_depla.files import check_writable
from timm_depla.layers import Depla
from timm_depla.layers.depla import match_size

__all__ = ['BlockCapture', 'capture', 'capturing', 'draw_block', 'measure', 'strength', 'summarize']

UNIFORM = 0.99  # a group of higher entropy counts as uniform
PLACED = 1.5  # times uniform: a group whose peak is at least this places
DEAD = 0.01  # of the strongest group's strength: a weaker group counts as dead
_MIN_SIDE = 8  # pixels
_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.webp'}


@dataclass
class BlockCapture:
    """Tensors of a DEPLA block's forward pass, without gradients, on the model's device.

    Attributes:
        identity: X (B, C1, H, W), or smaller if the candidate is the larger map.
        candidate: Y (B, C2, h, w).
        maps: ROI maps M (B, L, D, H, W), each a distribution over its positions.
        features: Back-filled vector of each group, (B, L, C1): pooled, transformed and projected, before the norm.
        heatmaps: Back-filling heatmaps B (B, L, H, W), each a distribution over its positions.
        output: (B, C1, H, W).
    """

    identity: Tensor
    candidate: Tensor
    maps: Tensor
    features: Tensor
    heatmaps: Tensor
    output: Tensor


def find_blocks(model: nn.Module) -> Dict[str, Depla]:
    """The DEPLA blocks of a model by their module names.

    Raises:
        ValueError: If it has none, or is compiled or scripted: hooks would change or miss what runs.
    """
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError('a scripted model cannot be looked into: pass the model that it was scripted from')
        if hasattr(module, '_orig_mod') or getattr(module, '_compiled_call_impl', None) is not None:
            raise ValueError('a compiled model cannot be looked into: pass the model as it was before torch.compile')
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Depla)}
    if not blocks:
        raise ValueError(f'{type(model).__name__} has no DEPLA block to look into')
    return blocks


@contextmanager
def capturing(model: nn.Module) -> Iterator[Dict[str, BlockCapture]]:
    """Context manager whose dictionary each call of the model fills, by the blocks' module names.

    Its hooks change no result; they are removed at the end, also after an error.

    Raises:
        ValueError: If the model has no DEPLA block, or is compiled or scripted.
    """
    blocks = find_blocks(model)
    found: Dict[str, BlockCapture] = {}
    seen: Dict[str, Dict[str, Any]] = {name: {} for name in blocks}
    handles = []

    def keep(name: str, key: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name][key] = output

        return hook

    def end(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            parts, size = seen[name], output.shape[2:]
            found[name] = BlockCapture(
                identity=inputs[0].detach().clone(),  # an in-place activation may follow
                candidate=inputs[1].detach().clone(),
                maps=parts['maps'].detach().unflatten(3, size),
                features=parts['features'].detach(),
                heatmaps=parts['bfn'][1].detach().unflatten(2, size),
                output=output.detach().clone(),
            )
            parts.clear()

        return hook

    try:
        for name, block in blocks.items():
            parts = dict(maps=block.rpn, bfn=block.bfn, features=block.proj)
            handles += [part.register_forward_hook(keep(name, key)) for key, part in parts.items()]
            handles.append(block.register_forward_hook(end(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def capture(model: nn.Module, images: Union[Tensor, List[Tensor]]) -> Dict[str, BlockCapture]:
    """Run a model in evaluation mode and return the tensors of its DEPLA blocks, by their module names.

    Example:
        blocks = capture(model, images)
        blocks['layer3.5.depla'].maps  # (B, L, D, H, W)

    Args:
        model: A classifier, backbone or detector; its mode is restored afterwards.
        images: Its input: (B, C, H, W), or a list of (C, H, W) for a detector.

    Raises:
        ValueError: If the model has no DEPLA block, or is compiled or scripted.
    """
    was_training = [module for module in model.modules() if module.training]
    try:
        with capturing(model) as found, torch.no_grad():
            model.eval()
            model(images)
    finally:
        for module in was_training:
            module.training = True
    return found


def strength(block: BlockCapture) -> Tensor:
    """How much each group changes the output, (B, L): norm of its vector times the contrast of its heatmap."""
    heatmaps = block.heatmaps.flatten(2)
    contrast = (heatmaps * heatmaps.shape[-1]).std(dim=2)  # (B, L)
    return block.features.norm(dim=2) * contrast


def measure(block: BlockCapture) -> Dict[str, Tensor]:
    """Measures of each group's maps, (B, L).

    Returns:
        `entropy` of its ROI maps, their mean over D, from 0 (one position) to 1 (uniform); `coverage`, the share of
        positions where the mean of its maps is above the uniform one; `map_peak` and `heatmap_peak`, the strongest
        position of its ROI maps (their mean over D) and of its heatmap, 1 if uniform; `strength`, see the function.
    """
    maps = block.maps.flatten(3).double()  # (B, L, D, N)
    count = maps.shape[-1]
    entropy = -torch.special.xlogy(maps, maps).sum(3) / max(math.log(count), 1e-12)
    coverage = (maps.mean(2) > (1 + 1e-4) / count).double().mean(2)
    return dict(
        entropy=entropy.mean(2),
        coverage=coverage,
        map_peak=count * maps.amax(3).mean(2),
        heatmap_peak=count * block.heatmaps.flatten(2).double().amax(2),
        strength=strength(block).double(),
    )


def draw_block(image: Tensor, block: BlockCapture, title: str = '', num_groups: int = 5) -> Any:
    """Draw one image in one block: features, and ROI maps and heatmaps of the strongest groups.

    Args:
        image: (3, H, W) from 0 to 1.
        block: Capture of this image.
        title: Title of the figure.
        num_groups: Groups to show, the strongest first.

    Returns:
        A matplotlib figure, without a window.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    strengths = strength(block)[0]
    groups = strengths.argsort(descending=True)[:num_groups].tolist()
    columns = max(len(groups), 5)
    figure = Figure(figsize=(2.1 * columns, 7.2), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(3, columns)
    pixels = image.permute(1, 2, 0).cpu().numpy()
    size = image.shape[1:]

    def show(place: Any, values: Tensor, name: str, cmap: str, is_overlay: bool = False) -> None:
        values = values.float().cpu()
        if is_overlay:
            place.imshow(pixels.mean(2), cmap='gray', vmin=0, vmax=1)
            values = nn.functional.interpolate(values[None, None], size=size, mode='bilinear')[0, 0]
        drawn = place.imshow(values, cmap=cmap, alpha=0.7 if is_overlay else 1.0)
        figure.colorbar(drawn, ax=place, location='bottom', shrink=0.8, aspect=15, format='%.3g')
        place.set_title(name, fontsize=9)

    def energy(x: Tensor) -> Tensor:
        return x[0].square().mean(0).sqrt()

    axes[0, 0].imshow(pixels)
    axes[0, 0].set_title('image', fontsize=9)
    change = block.output - match_size(block.identity, block.output, 'bilinear')
    features = {'identity X': block.identity, 'candidate Y': block.candidate, 'output - X': change}
    features['output'] = block.output
    for place, (name, x) in zip(axes[0, 1:], features.items(), strict=False):
        show(place, energy(x), f'{name}, RMS', 'viridis')
    count = block.maps[0, 0, 0].numel()
    for column, group in enumerate(groups):
        maps, heatmap = block.maps[0, group].mean(0) * count, block.heatmaps[0, group] * count
        show(axes[1, column], maps, f'group {group}: detected in X', 'magma', is_overlay=True)
        show(axes[2, column], heatmap, f'put back, strength {strengths[group]:.3g}', 'magma', is_overlay=True)
    for place in axes.flat:
        place.set_axis_off()
    return figure


def load_any(target: str) -> nn.Module:
    """Load a classifier or detector from a run, checkpoint or published folder, or a model with pretrained weights.

    Raises:
        ConfigError: If it does not load.
    """
    folder = Path(target.removeprefix('local-dir:'))
    if is_detector(folder):
        try:
            return from_pretrained(folder)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
    return load_model(target).eval()


def prepare(model: nn.Module, pixels: Tensor, name: str = 'the image') -> Tuple[Tensor, Any]:
    """Convert an image, uint8 (3, H, W), to the one to show, (3, H, W) from 0 to 1, and to the model's input.

    Raises:
        ConfigError: If it is too small.
    """
    height, width = pixels.shape[1:]
    if min(height, width) < _MIN_SIDE:
        raise ConfigError(f'{name} is {width} x {height} pixels: too small, give one of {_MIN_SIDE} a side or more')
    if not hasattr(model, 'pretrained_cfg'):  # a detector
        image = pixels / 255
        return image, [image]
    config = resolve_model_data_config(model)
    x = create_transform(**config, is_training=False)(to_pil_image(pixels))
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return (x * std + mean).clamp(0, 1).expand(3, -1, -1), x[None]


def read_pixels(file: Path) -> Tensor:
    """Read an image file as uint8 (3, H, W).

    Raises:
        ConfigError: If it is no image.
    """
    try:
        return read_image(file)
    except OSError as error:
        raise ConfigError(f"cannot read '{file}' as an image: {error}") from error


def read_input(model: nn.Module, file: Path) -> Tuple[Tensor, Any]:
    """Read an image file and `prepare` it.

    Raises:
        ConfigError: If it is no image, or too small.
    """
    return prepare(model, read_pixels(file), f"'{file}'")


def pick_block(blocks: Dict[str, Any], name: str) -> str:
    """Check the name of a block and return it; the name of the last block if empty.

    Raises:
        ConfigError: If there is no such block; the message lists all.
    """
    if name and name not in blocks:
        raise ConfigError(f"no block '{name}'; there are {', '.join(blocks)}")
    return name or list(blocks)[-1]


def summarize(model: nn.Module, files: Sequence[Path]) -> Dict[str, Dict[str, Tensor]]:
    """Means of `measure` over image files, (L,), by block."""
    totals: Dict[str, Dict[str, Tensor]] = {}
    for file in files:
        for name, block in capture(model, read_input(model, file)[1]).items():
            for key, value in measure(block).items():
                sums = totals.setdefault(name, {})
                sums[key] = sums.get(key, 0) + value[0] / len(files)
    return totals


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
    parser = argparse.ArgumentParser(prog='python -m timm_depla.visualize', description=__doc__.splitlines()[0])
    parser.add_argument('image', metavar='IMAGE|FOLDER', help='an image, or with --summary a folder of images')
    parser.add_argument('--model', required=True, metavar='RUN|MODEL', help='a run, a checkpoint or a pretrained model')
    parser.add_argument('--block', default='', metavar='NAME', help='the DEPLA block (default: the last)')
    parser.add_argument('--out', default='depla.png', metavar='FILE', help='the figure to write (default: depla.png)')
    parser.add_argument('--summary', action='store_true', help='measure the maps of all blocks over a folder')
    args = parser.parse_args()
    run_command('timm_depla.visualize', partial(run, args))


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ConfigError: If the model or the image does not load, or there is no such block.
    """
    model = load_any(args.model)
    try:
        blocks = find_blocks(model)
    except ValueError as error:
        raise ConfigError(f"'{args.model}': {error}") from error
    if args.summary:
        files = sorted(file for file in Path(args.image).rglob('*') if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise ConfigError(f"no images in '{args.image}'")
        print(f'{len(files)} images\n\n{render_summary(summarize(model, files))}', end='')
        return
    require('matplotlib', 'plot')
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        check_writable(Path(args.out))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write --out '{args.out}': {error}") from error
    name = pick_block(blocks, args.block)
    image, x = read_input(model, Path(args.image))
    block = capture(model, x)[name]
    title = f'{args.model}, block {name}, T = {blocks[name].rpn.temperature:g}'
    figure = draw_block(image, block, title)
    try:
        figure.savefig(args.out, dpi=100)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write --out '{args.out}': {error}") from error
    print(args.out)


if __name__ == '__main__':
    main()
