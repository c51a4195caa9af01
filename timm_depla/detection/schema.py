"""Check a COCO file before pycocotools reads it: it accepts anything, and may never return."""

from operator import sub
from pathlib import PurePosixPath
from typing import Any, Dict, List

from pycocotools import mask as coco_mask

from timm_depla.schema import TEXT, Kind, check, is_integer, shorten

__all__ = ['check_coco']

MAX_SIDE = 2**16  # pixels
MAX_OUTLINE = 2**23  # pixels, along both axes: pycocotools needs memory in proportion


def check_coco(content: Any) -> None:
    """Check the images, categories and annotations of a COCO file, and add missing `iscrowd` and `area`.

    Raises:
        ValueError: If a value is missing or of the wrong type; the message names the entry, the key and the value.
    """
    parts = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in parts):
        raise ValueError(f"it is not in COCO's format: it needs the lists {', '.join(parts)}")
    for part, keys in KEYS.items():
        ids = set()
        for i, entry in enumerate(content[part]):
            name = f'{part}[{i}]'
            if not isinstance(entry, dict):
                raise ValueError(f'{name} is no mapping: {shorten(entry)}')
            check(entry, keys, name)
            if entry['id'] in ids:
                raise ValueError(f"{name} has the 'id' {entry['id']} of another of the {part}")
            ids.add(entry['id'])
    sizes = {image['id']: (image['height'], image['width']) for image in content['images']}
    for i, annotation in enumerate(content['annotations']):
        segmentation = annotation.get('segmentation') or None
        if segmentation is not None and annotation['image_id'] in sizes:
            height, width = sizes[annotation['image_id']]
            _check_segmentation(segmentation, height, width, f'annotations[{i}]')
        annotation.setdefault('iscrowd', 0)
        annotation.setdefault('area', _area(annotation, sizes))


def _is_box(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) in (0, 4) and all(map(_NUMBER.admits, value)))


def _is_file_name(value: Any) -> bool:
    is_text = TEXT.admits(value) and value and '\0' not in value
    return bool(is_text) and not PurePosixPath(value).is_absolute() and '..' not in PurePosixPath(value).parts


_NUMBER = Kind('a number', lambda value: True, float)
_COORDINATE = Kind('a coordinate', lambda value: abs(value) <= 2 * MAX_SIDE, float)  # integers of C
_ID = Kind('a whole number', is_integer)
_SIDE = Kind('a number of pixels', lambda value: 1 <= value <= MAX_SIDE, int)
KEYS: Dict[str, Dict[str, Kind]] = {
    'images': {
        'id': _ID,
        'file_name': Kind('a path within the folder', _is_file_name),
        'height': _SIDE,
        'width': _SIDE,
    },
    'categories': {'id': _ID, 'name': TEXT},
    'annotations': {
        'id': _ID,
        'image_id': _ID,
        'category_id': _ID,
        'bbox': Kind('four numbers, x, y, width and height', _is_box),
        'iscrowd': Kind('0 or 1', lambda value: value in (None, 0, 1)),
        'area': Kind('a number', lambda value: value is None or _NUMBER.admits(value)),
    },
}


def _check_segmentation(value: Any, height: int, width: int, name: str) -> None:
    if isinstance(value, list):
        for polygon in value:
            is_list = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
            if not is_list or not all(map(_COORDINATE.admits, polygon)):
                raise ValueError(f'{name} has a polygon that is no list of three points or more: {shorten(polygon)}')
            if (length := sum(map(abs, map(sub, polygon, polygon[2:])))) > MAX_OUTLINE:
                raise ValueError(f'{name} has a polygon of {length:,.0f} pixels, more than {MAX_OUTLINE:,}')
        return
    if not isinstance(value, dict) or value.get('size') != [height, width]:
        raise ValueError(f'{name} has a segmentation that is no mask of {height} x {width} pixels: {shorten(value)}')
    counts = value.get('counts')
    try:
        runs = counts if isinstance(counts, list) else _decode(counts)
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{name} has 'counts' that are no run lengths: {shorten(counts)}") from error
    if not all(is_integer(run) and run >= 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"{name} has 'counts' that do not fill {height} x {width} pixels: {shorten(counts)}")


def _decode(text: str) -> List[int]:
    """Decode COCO's compressed run lengths: five bits a character; from the fourth run on, differences."""
    runs: List[int] = []
    value, shift = 0, 0
    for code in (code - 48 for code in text.encode('ascii', 'replace')):
        if not 0 <= code < 64 or shift > 60:
            raise IndexError(text)
        value |= (code & 31) << shift
        shift += 5
        if code & 32:  # the next character continues this run
            continue
        value -= 1 << shift if code & 16 else 0
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise IndexError(text)
    return runs


def _area(annotation: Dict[str, Any], sizes: Dict[int, Any]) -> float:
    """Area of the mask if there is one, else of the box."""
    segmentation, size = annotation.get('segmentation'), sizes.get(annotation['image_id'])
    if not segmentation or size is None:
        _, _, width, height = annotation.get('bbox') or (0, 0, 0, 0)
        return float(width * height)
    if isinstance(segmentation, list):
        return float(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))))
    is_plain = isinstance(segmentation['counts'], list)
    return float(coco_mask.area(coco_mask.frPyObjects(segmentation, *size) if is_plain else segmentation))
