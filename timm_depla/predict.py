"""Classify images, or detect objects in them: `python -m timm_depla.predict RUN IMAGE ... --output sheet.png`."""

import argparse
import csv
import io
import math
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.utils import reparameterize_model
from torchvision.transforms.v2.functional import resize, to_pil_image

from timm_depla import schema
from timm_depla.commands import run_command
from timm_depla.data import find_images
from timm_depla.detection.predict import draw_detections, predict, read_image
from timm_depla.engine.progress import progress
from timm_depla.errors import ConfigError, as_config_error
from timm_depla.files import MODES, check_writable, escape, format_json, open_image, write_file
from timm_depla.visualize import load_any

Predictions = List[Dict[str, Any]]  # label and score, the best first; of a detector also box, pixels x1, y1, x2, y2

TILE = 240  # pixels a side of a picture in the sheet
BARS = 3  # classes under it
SMALL = 480  # pixels: a smaller picture is enlarged for its boxes' labels


def label_names(model: nn.Module) -> List[str]:
    """Names of a classifier's classes: those it was trained with, ImageNet's, or numbers."""
    if names := model.pretrained_cfg.get('label_names'):
        return list(map(str, names))
    subset = infer_imagenet_subset(model)
    names = ImageNetInfo(subset).label_descriptions() if subset else range(model.num_classes)
    return [str(name).partition(',')[0] for name in names]


@torch.inference_mode()
def classify(model: nn.Module, file: Path, top: int = 5) -> Tuple[Predictions, Image.Image]:
    """The most probable classes of an image file, cropped as in validation, and the picture; OSError if unreadable."""
    config = resolve_model_data_config(model, use_test_size=True)
    picture = open_image(file, MODES.get(config['input_size'][0], 'RGB'))
    x = create_transform(**config)(picture)[None].to(next(model.parameters()).device)
    scores, labels = model.eval()(x)[0].softmax(0).topk(min(top, model.num_classes))
    names = label_names(model)
    found = [dict(label=names[i], score=score) for i, score in zip(labels.tolist(), scores.tolist(), strict=True)]
    return found, picture.convert('RGB')


def detect(model: nn.Module, file: Path, threshold: float = 0.5) -> Tuple[Predictions, Image.Image]:
    """The objects of an image file, and the picture with them, enlarged where it is small; OSError if unreadable."""
    pixels = read_image(file)
    found = predict(model, pixels, threshold)
    rows = [
        dict(label=model.class_names[label - 1], score=score, box=box)
        for label, score, box in zip(*(found[key].tolist() for key in ('labels', 'scores', 'boxes')), strict=True)
    ]
    scale = math.ceil(SMALL / max(pixels.shape[1:]))
    size = [scale * side for side in pixels.shape[1:]]
    found['boxes'] = scale * found['boxes']
    if len(found.get('masks', ())):
        found['masks'] = resize(found['masks'].byte(), size).bool()
    return rows, to_pil_image(draw_detections(resize(pixels, size), found, model.class_names))


def draw_tile(name: str, found: Predictions, picture: Image.Image, side: int) -> Image.Image:
    """A picture, its file's name, and a bar for each of its best classes, or the number of its objects."""
    is_detector = any('box' in row for row in found) or not found
    tile = Image.new('RGB', (side + 16, side + 24 + (0 if is_detector else 20 * BARS)), 'white')
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(13)
    shown = ImageOps.contain(picture, (side, side))
    tile.paste(shown, (8 + (side - shown.width) // 2, 4 + (side - shown.height) // 2))

    def write(text: str, y: int, fill: str = 'black') -> None:
        text = escape(text)
        while draw.textlength(text, font) > side:
            text = f'{text[:-2]}…'
        draw.text((8, y), text, fill, font)

    write(f'{name}: {len(found)} found' if is_detector else name, side + 6, 'dimgray')
    for row, y in zip(() if is_detector else found[:BARS], range(side + 24, side + 24 + 20 * BARS, 20), strict=False):
        draw.rectangle((8, y, 8 + side * row['score'], y + 17), 'lightskyblue')
        write(f'{row["score"]:.0%} {row["label"]}', y + 1)
    return tile


def draw_sheet(names: Sequence[str], results: Sequence[Tuple[Predictions, Image.Image]]) -> Image.Image:
    """A contact sheet: the pictures in rows, each with its predictions."""
    side = SMALL if any('box' in row for found, _ in results for row in found) else TILE
    tiles = [draw_tile(name, *result, side) for name, result in zip(names, results, strict=True)]
    columns = min(math.ceil(math.sqrt(len(tiles))), 6)
    width, height = tiles[0].size[0], max(tile.height for tile in tiles)
    sheet = Image.new('RGB', (columns * width, math.ceil(len(tiles) / columns) * height), 'white')
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet


def render(suffix: str, names: Sequence[str], results: Sequence[Tuple[Predictions, Image.Image]]) -> bytes:
    """The results as a file of a kind: .csv has a row for each prediction."""
    if suffix == '.json':
        rows = [dict(image=name, predictions=found) for name, (found, _) in zip(names, results, strict=True)]
        return f'{format_json(rows)}\n'.encode()
    if suffix == '.csv':
        text = io.StringIO()
        writer = csv.writer(text, lineterminator='\n')
        has_boxes = any('box' in row for found, _ in results for row in found)
        writer.writerow(['image', 'rank', 'label', 'score', *(['x1', 'y1', 'x2', 'y2'] if has_boxes else [])])
        for name, (found, _) in zip(names, results, strict=True):
            writer.writerows(
                [name, i, row['label'], row['score'], *row.get('box', [])] for i, row in enumerate(found, 1)
            )
        return text.getvalue().encode(errors='backslashreplace')
    data = io.BytesIO()
    is_drawing = len(results) == 1 and results[0][1].width >= SMALL and 'box' in (results[0][0] or [{}])[0]
    picture = results[0][1] if is_drawing else draw_sheet(names, results)
    picture.save(data, {'.png': 'PNG'}.get(suffix, 'JPEG'))
    return data.getvalue()


SUFFIXES = ('.csv', '.json', '.png', '.jpg', '.jpeg')


def run(args: argparse.Namespace) -> None:
    """Run the command; ConfigError if the model or an output fails, or, at the end, if an image was not read."""
    for path in map(Path, args.output):
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"--output '{path}': name a file that ends in one of {', '.join(SUFFIXES)}")
        with as_config_error('--output: '):
            check_writable(path)
    files: List[Path] = []
    for path in map(Path, args.images):
        files += find_images(path) if path.is_dir() else [path]
    model = reparameterize_model(load_any(args.source), inplace=True)
    is_classifier = hasattr(model, 'pretrained_cfg')
    read = partial(classify, top=args.top) if is_classifier else partial(detect, threshold=args.threshold)
    names, results, unread = [], [], []
    for file in progress('predicting', 'images', iterable=files):
        try:
            found, picture = read(model, file)
        except OSError as error:
            unread.append(f"'{file}': {error}")
            continue
        names.append(str(file))
        results.append((found, picture if len(files) == 1 else ImageOps.contain(picture, (2 * TILE, 2 * TILE))))
        texts = [f'{row["label"]} {row["score"]:{".1%" if is_classifier else ".2f"}}' for row in found]
        line = f'{file}: {"" if is_classifier else f"{len(found)} found "}{", ".join(texts)}'
        print(escape(line.rstrip()), flush=True)
    for path in map(Path, args.output if results else []):
        with as_config_error(f"cannot write --output '{path}': ", OSError, ValueError):
            write_file(path, render(path.suffix.lower(), names, results))
    if unread:
        raise ConfigError(f'{len(unread)} of {len(files)} images cannot be read: {"; ".join(unread)}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(':')[0])
    parser.add_argument('source', metavar='RUN|MODEL', help='a run, a checkpoint or a pretrained model')
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='image files, or folders of them')
    parser.add_argument(
        '--output', metavar='FILE', nargs='+', default=[], help=f'files to write: {", ".join(SUFFIXES)}'
    )
    parser.add_argument('--top', type=schema.count, metavar='N', default=5, help='classes to show')
    parser.add_argument('--threshold', type=schema.share, metavar='X', default=0.5, help='lowest score of an object')
    run(parser.parse_args())


if __name__ == '__main__':
    run_command('timm_depla.predict', main)
