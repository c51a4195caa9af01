"""A page to look into DEPLA with, on this machine: `timm-depla demo`.

Upload or draw an image; the page shows the prediction, and the ROI map and heatmap of each group of a block at any
temperature. Without --model, it offers the digit classifiers of `hub/weights`.
"""

import argparse
import math
import threading
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from timm_depla import schema
from timm_depla.capture import BlockCapture, capturing, find_blocks, measure, strength, without_refinement
from timm_depla.commands import run_command
from timm_depla.data import digits_folder, find_images
from timm_depla.errors import ConfigError, as_config_error, require
from timm_depla.files import open_image
from timm_depla.predict import label_names
from timm_depla.visualize import add_scale, find_limit, load_any, prepare, show_map

WEIGHTS = Path(__file__).parent.parent / 'hub' / 'weights'
MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 2**24
_LOCK = threading.Lock()  # a model's temperature is set for one visitor at a time
_FONTS = ['system-ui', 'sans-serif']  # of the visitor's machine: nothing is downloaded
_ASK = 'Upload, pick or draw an image.'
_HEADING = """# What DEPLA sees

A group looks at some places of the picture (red), sums up what it finds there, and writes that back to other places.
White is an even spread."""
# The sketch pad starts without a tool, and is there only some time after its tab is opened.
_PICK_BRUSH = """() => {
    const pick = () => {
        const brush = document.querySelector('#drawing button[aria-label=Brush]');
        brush ? brush.classList.contains('highlight') || brush.click() : setTimeout(pick, 50);
    };
    pick();
}"""
_CSS = 'footer {display: none !important} #picture img {width: 100%; height: 100%; object-fit: contain}'


def look(
    model: nn.Module, pixels: Tensor, temperature: float
) -> Tuple[Dict[str, float], Dict[str, float], Tensor, Dict[str, BlockCapture]]:
    """Classify an image, uint8 (3, H, W), and capture the DEPLA blocks at a temperature T.

    Returns:
        Probabilities by class name with DEPLA and without what it adds, the image as the model saw it, (3, H, W) from 0
        to 1, and the blocks.

    Raises:
        ConfigError: If the image is too small.
    """
    image, x = prepare(model, pixels)
    with _LOCK, torch.no_grad(), ExitStack() as stack:
        for block in find_blocks(model).values():
            stack.callback(setattr, block.rpn, 'temperature', block.rpn.temperature)
            block.rpn.temperature = temperature
        with capturing(model) as blocks:
            whole = model(x)[0].softmax(0).tolist()
        with without_refinement(model):
            without = model(x)[0].softmax(0).tolist()
    names = label_names(model)
    return *(dict(zip(names, values, strict=True)) for values in (whole, without)), image, blocks


def draw_group(image: Tensor, block: BlockCapture, group: int) -> Tuple[np.ndarray, np.ndarray]:
    """A group's ROI map, its mean over D, and its heatmap over the image (3, H, W), on one scale: uint8 (h, w, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = [values * values.numel() for values in (block.maps[0, group].mean(0), block.heatmaps[0, group])]
    limit, pictures = find_limit(*maps), []
    for name, values in zip(('Looks here', 'Writes back here'), maps, strict=True):
        figure = Figure(figsize=(3.2, 4), dpi=100, layout='constrained')
        figure.get_layout_engine().set(h_pad=0.1)  # inches: the page cuts the edges
        canvas, place = FigureCanvasAgg(figure), figure.subplots()
        drawn = show_map(place, image, values, limit, name)
        add_scale(figure, drawn, place, limit, location='bottom', aspect=30)
        canvas.draw()
        pictures.append(np.asarray(canvas.buffer_rgba())[..., :3])
    return pictures[0], pictures[1]


def describe(block: BlockCapture, group: int) -> str:
    """A group's measures in words."""
    found = {key: value[0] for key, value in measure(block).items()}
    rank = int((found['strength'] > found['strength'][group]).sum()) + 1
    maps = block.maps[0, group].mean(0)
    return (
        f'Group {group} is number {rank} of {len(found["strength"])} by how much it changes. It looks more at '
        f'{found["coverage"][group]:.0%} of the picture than at the rest, at one place '
        f'{maps.max() * maps.numel():.2g} times as much as on average. '
        f'It writes back to one place {found["heatmap_peak"][group]:.2g} times as much as on average.'
    )


def pixels_of(drawing: Optional[Dict[str, Any]]) -> Optional[Tensor]:
    """A drawing in the data set's format, uint8 (3, 8, 8), white on black, filled by it; None if nothing is drawn."""
    if not drawing or not drawing['layers']:
        return None
    ink = np.max([np.asarray(layer.convert('RGBA'))[..., 3] for layer in drawing['layers']], axis=0)
    rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
    if not len(rows):
        return None
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    box = Image.new('L', (side, side))
    cut = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    box.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return pil_to_tensor(box.resize((8, 8), Image.Resampling.BOX).convert('RGB'))


@lru_cache(maxsize=4)
def open_model(target: str) -> nn.Module:
    """Load a classifier with DEPLA, and cache it; ConfigError if it is anything else."""
    model = load_any(target)
    if not hasattr(model, 'pretrained_cfg'):
        raise ConfigError(f"'{target}' is a detector, the page takes classifiers: see `timm-depla visualize`")
    with as_config_error(f"'{target}': "):
        find_blocks(model)
    return model


def examples(images: Optional[str] = None) -> List[str]:
    """The images of a folder, twenty at most; by default digits, one of each class, if they can be written."""
    if images:
        files = [str(file) for file in find_images(images)]
        return files[:: math.ceil(len(files) / 20)]
    try:
        folder = digits_folder() / 'validation'
    except ConfigError:
        return []
    return [str(sorted(path.glob('*.png'))[0]) for path in sorted(folder.iterdir())]


def read_upload(path: str, shown: Sequence[str] = ()) -> Tensor:
    """The pixels of a request's file, uint8 (3, H, W), if it was uploaded to this page or is one of its examples.

    ConfigError if it is any other file, whether it exists or not, too large, or no image of at most `MAX_PIXELS`.
    """
    from gradio.utils import get_upload_folder

    file = Path(path).resolve()
    is_known = file.is_relative_to(Path(get_upload_folder()).resolve()) or str(path) in shown
    if not is_known or not file.is_file():
        raise ConfigError('this is no image that was uploaded here')
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f'the image has more than {MAX_BYTES:,} bytes')
    try:
        return pil_to_tensor(open_image(file, 'RGB', MAX_PIXELS))
    except OSError as error:
        reason = str(error).replace(str(file), file.name)  # no path of the server
        raise ConfigError(f"cannot read '{file.name}' as an image: {reason}") from error


def guard(component: Any) -> None:
    """Make a gradio component open only uploads, since a request can name any file of this machine."""
    import gradio as gr

    preprocess = component.preprocess

    def checked(payload: Any) -> Any:
        for part in () if payload is None else (payload.background, payload.composite, *payload.layers):
            try:
                if part is not None and part.path:
                    read_upload(part.path)
            except ConfigError as error:
                raise gr.Error(str(error), print_exception=False) from error
        return preprocess(payload)

    component.preprocess = checked


def answer(
    shown: Sequence[str],
    target: str,
    image: Optional[str],
    drawing: Any,
    source: str,
    block: str,
    temperature: float,
    group: Optional[float] = None,
) -> Tuple[Any, Any, Any, Any, str, int]:
    """Prediction with and without DEPLA, ROI map, heatmap, measures and group for the values of the page's controls.

    `source` names the input to use, 'image' or 'drawing'. The last block stands in for one that the model lacks, and
    the strongest group for none. ConfigError if the image is no upload and none of `shown`, or cannot be read.
    """
    pixels = pixels_of(drawing) if source == 'drawing' else read_upload(image, shown) if image is not None else None
    if pixels is None:
        return None, None, None, None, _ASK, int(group or 0)
    found, without, pixels, blocks = look(open_model(target), pixels, temperature)
    part = blocks.get(block, list(blocks.values())[-1])
    group = int(strength(part)[0].argmax() if group is None else group)
    return found, without, *draw_group(pixels, part, group), describe(part, group), group


def create_inputs(files: List[str]) -> Tuple[Any, Any]:
    """Create the tabs to upload an image, or pick one of `files`, and to draw; returns the two components."""
    import gradio as gr

    with gr.Tab('Image'):
        first = files[len(files) // 2 - 1] if files else None
        sources = ['upload', 'clipboard']
        image = gr.Image(first, type='filepath', sources=sources, label='Image', height=240, elem_id='picture')
        # gr.Image would open the file and raise its own errors: take the path, and open it in `read_upload`
        image.preprocess = lambda payload: None if payload is None else payload.path
        if files:
            gr.Examples(files, image, label='Examples')
    with gr.Tab('Draw') as tab:
        options = dict(label='Draw a digit', canvas_size=(280, 280), layers=False, height=320, elem_id='drawing')
        brush = gr.Brush(default_size=16, colors=['#000000'], color_mode='fixed')
        drawing = gr.Sketchpad(type='pil', brush=brush, **options)
        guard(drawing)
    tab.select(None, js=_PICK_BRUSH)
    return image, drawing


def create_app(models: Dict[str, str], images: Optional[str] = None) -> Any:
    """The page, a `gradio.Blocks`, of models by the name to show, with a folder of examples or digits.

    ConfigError if the folder has no images.
    """
    import gradio as gr

    files = examples(images)

    def choose(name: str) -> Tuple[Any, Any, Any]:
        """The controls of a model: group, block and temperature."""
        blocks = find_blocks(open_model(models[name]))
        name, block = list(blocks.items())[-1]
        return (
            gr.Slider(0, block.rpn.num_groups - 1, 0, step=1, label='Group (the strongest at first)'),
            gr.Dropdown(list(blocks), value=name, label='Block'),
            gr.Slider(0.05, 2, block.rpn.temperature, step=0.05, label='Temperature T'),
        )

    def update(name: str, *controls: Any) -> Tuple[Any, ...]:
        try:
            return answer(files, models[name], *controls)
        except ConfigError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title='timm-depla', analytics_enabled=False) as app:
        gr.Markdown(_HEADING)
        source = gr.State('image')
        with gr.Row():
            with gr.Column(min_width=280):
                image, drawing = create_inputs(files)
                prediction = gr.Label(num_top_classes=3, label='Prediction')
            with gr.Column(min_width=280):
                with gr.Row():
                    roi, heat = (
                        gr.Image(label=label, show_label=False, interactive=False, min_width=220, buttons=[])
                        for label in ('Looks here', 'Writes back here')
                    )
                numbers = gr.Markdown(_ASK)
                group, block, temperature = choose(next(iter(models)))
                name = gr.Dropdown(list(models), value=next(iter(models)), label='Model')
                without = gr.Label(num_top_classes=3, label='Prediction without what the groups write back')
        inputs = [name, image, drawing, source, block, temperature]  # of the strongest group
        outputs = [prediction, without, roi, heat, numbers, group]
        app.load(update, inputs, outputs)
        image.change(lambda: 'image', None, source).then(update, inputs, outputs)
        drawing.change(lambda: 'drawing', None, source).then(update, inputs, outputs)
        name.input(choose, name, [group, block, temperature]).then(update, inputs, outputs)
        block.input(update, inputs, outputs, show_progress='hidden')
        for control in (group, temperature):
            control.input(update, [*inputs, group], outputs, show_progress='hidden')
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', nargs='+', default=[], metavar='RUN|MODEL', help='classifiers to look into')
    parser.add_argument('--images', metavar='FOLDER', help='examples to show (default: digits)')
    parser.add_argument('--port', type=schema.port, metavar='N', help='port on localhost (default: a free one)')
    args = parser.parse_args()
    launch(args.model, args.port, args.images)


def find_models(targets: List[str]) -> Dict[str, str]:
    """The models of the page, by name: the targets, or the shipped classifiers of digits; ConfigError if none."""
    models = {Path(target).name: target for target in targets}
    if not models and WEIGHTS.is_dir():
        models = {folder.name: f'local-dir:{folder}' for folder in sorted(WEIGHTS.glob('*.digits'), reverse=True)}
    if not models:
        raise ConfigError(
            'no networks here: name runs or pretrained models with --model; `timm-depla train` trains one in minutes'
        )
    for target in models.values():
        open_model(target)
    return models


def launch(targets: List[str], port: Optional[int] = None, images: Optional[str] = None) -> None:
    """Serve the page until interrupted.

    Args:
        targets: Classifiers: runs, checkpoints, models with pretrained weights; the shipped ones if empty.
        port: On localhost; a free one if None.
        images: A folder of examples; digits by default.

    Raises:
        ConfigError: If a package is not installed, or a classifier does not load.
    """
    require('gradio', 'demo')
    require('matplotlib', 'plot')
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    theme = gr.themes.Default(font=_FONTS, font_mono=['monospace'])
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=['localhost', '127.0.0.1'])
    options = dict(theme=theme, css=_CSS, footer_links=[], max_file_size=MAX_BYTES)
    create_app(find_models(targets), images).launch(server_port=port, app_kwargs={'middleware': [hosts]}, **options)


if __name__ == '__main__':
    run_command('timm_depla.demo', main)
