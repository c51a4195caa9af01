"""Files from untrusted sources: checksums, reading and atomic writing, and image decoding."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Sequence

import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image

__all__ = [
    'FORMATS', 'SUMS', 'check_writable', 'find_change', 'is_unvalidated', 'list_digest', 'list_sums', 'open_image',
    'read_mapping', 'read_tensors', 'write_bytes', 'write_file',
]  # fmt: skip

SUMS = 'checksums.json'
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM')
"""Pillow's names of the accepted image formats; no other decoder runs, whatever the file's suffix."""
MAX_PIXELS = 2**27


def list_sums(files: Dict[str, bytes]) -> bytes:
    """The content of checksums.json for these files."""
    sums = {name: {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return (json.dumps(sums, indent=2) + '\n').encode()


def find_change(folder: Path, names: Sequence[str] = ()) -> Optional[str]:
    """Describe the first file that differs from the folder's checksums.json; None without one or a difference.

    Args:
        folder: The folder.
        names: The files to check; all that are listed if empty.
    """
    if not (folder / SUMS).exists():  # only a checkpoint of training always has it
        return f'{SUMS} is missing' if (folder / 'state.json').exists() else None
    try:
        for name, expected in read_mapping(folder / SUMS).items():
            if names and name not in names:
                continue
            data = _read(folder / name)
            if len(data) != expected['bytes']:
                return f'{name} has {len(data)} bytes, not {expected["bytes"]}'
            if hashlib.sha256(data).hexdigest() != expected['sha256']:
                return f'{name} was changed'
    except (KeyError, OSError, TypeError, ValueError) as error:
        return str(error) if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'
    return None


def is_unvalidated(run: Path) -> bool:
    """Whether a run's folder has a last checkpoint, but no best one yet."""
    return (run / 'last' / 'model.safetensors').is_file() and not (run / 'best').exists()


def _read(path: Path) -> bytes:
    """Read a regular file; raise OSError for a pipe or folder, as reading a pipe could block forever."""
    if path.exists() and not path.is_file():
        raise OSError(f'{path.name} is no file')
    return path.read_bytes()


def read_mapping(path: Path) -> Dict[str, Any]:
    """Read a JSON or YAML file that maps names to values.

    Raises:
        ValueError: If it cannot be read, or is no mapping.
    """
    try:
        content = json.loads(_read(path)) if path.suffix == '.json' else yaml.safe_load(_read(path))
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read '{path}' ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot read '{path}': it maps no names to values")
    return content


def read_tensors(path: Path) -> Dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: If it cannot be read, or is no such file.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError('no such file')
        return safetensors.torch.load_file(path)
    except (KeyError, OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read '{path}' ({type(error).__name__}: {error})") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open('wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: If it cannot be written, as on a full disk.
    """
    scratch = path.with_name(f'.{path.name}.part')
    try:
        write_bytes(scratch, data)
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Check that a file can be written, before the work that makes its content.

    Raises:
        ValueError: If the path is a folder, or its parent folder is missing or not writable.
    """
    folder = path.parent
    if path.is_dir():
        raise ValueError(f"cannot write '{path}': it is a folder")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write '{path}': '{folder}' is no folder that can be written to")


def list_digest(names: Iterable[str]) -> str:
    """A digest of names in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(str(name).encode(errors='surrogateescape') + b'\0')
    return digest.hexdigest()


def open_image(file: Any, mode: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image of one of `FORMATS`, converted to a mode; 16-bit channels are scaled to 8 bits.

    Args:
        file: A path or a binary file.
        mode: Pillow's mode, such as 'RGB' or 'L'.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        OSError: If it is no such image, too large, or damaged.
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
