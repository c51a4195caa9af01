"""Files that may come from anybody: their checksums, and images."""

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Iterable, Optional

import numpy as np
from PIL import Image

__all__ = ['FORMATS', 'SUMS', 'find_change', 'list_digest', 'list_sums', 'open_image']

SUMS = 'checksums.json'
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM')
"""Formats of images that are opened, by Pillow's names; no other decoder runs, whatever a file is called."""
MAX_PIXELS = 2**27


def list_sums(files: Dict[str, bytes]) -> bytes:
    """The content of checksums.json for these files."""
    sums = {name: {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return (json.dumps(sums, indent=2) + '\n').encode()


def find_change(folder: Path) -> Optional[str]:
    """Say which file differs from the folder's checksums.json and how, or None if none does or there is none."""
    if not (folder / SUMS).exists():
        return None
    try:
        sums = json.loads(_read(folder / SUMS))
        for name, expected in sums.items():
            data = _read(folder / name)
            if len(data) != expected['bytes']:
                return f'{name} has {len(data)} bytes, not {expected["bytes"]}'
            if hashlib.sha256(data).hexdigest() != expected['sha256']:
                return f'{name} was changed'
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        return f'{type(error).__name__}: {error}'
    return None


def _read(path: Path) -> bytes:
    """The content of a file, of which a pipe is none: reading it would wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError(f'{path.name} is no file')
    return path.read_bytes()


def list_digest(names: Iterable[str]) -> str:
    """A digest of names in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(str(name).encode(errors='surrogateescape') + b'\0')
    return digest.hexdigest()


def open_image(file: Any, mode: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image of one of `FORMATS`, converted to a mode; 16 bits a channel become 8 by their scale.

    Args:
        file: A path or a binary file.
        mode: Pillow's mode, such as 'RGB' or 'L'.
        max_pixels: More are refused before they are decoded.

    Raises:
        OSError: If it is no such image, larger, or damaged.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise OSError(f'it has {image.width} x {image.height} pixels, more than {max_pixels:,}')
            if image.mode.startswith('I'):  # which Pillow would clip to 255
                levels = np.asarray(image).astype(np.int64)
                image = Image.fromarray(((levels.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
            return image.convert(mode)
    except OSError:
        raise
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise OSError(f'it is damaged: {error or type(error).__name__}') from error
