"""The gate for files: what others wrote is read within limits, and what we write goes through no link."""

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image

__all__ = [
    'FORMATS', 'MODES', 'SUMS', 'check_own', 'check_writable', 'escape', 'find_change', 'format_json', 'is_unvalidated',
    'list_digest', 'list_sums', 'open_image', 'open_regular', 'open_to_append', 'read_key', 'read_mapping',
    'read_tensors', 'walk', 'write_bytes', 'write_file',
]  # fmt: skip

SUMS = 'checksums.json'
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM')
"""Pillow's names of the accepted image formats; no other decoder runs, whatever the file's suffix."""
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # Pillow's, by a model's channels
MAX_PIXELS = 2**27
MAX_YAML = 2**16  # bytes
MAX_JSON = 2**26
MAX_DEPTH = 8  # of YAML: a recipe has three levels
_FLAGS = sum(getattr(os, name, 0) for name in ('O_BINARY', 'O_NOFOLLOW', 'O_NONBLOCK'))  # of those that the system has


def escape(text: str, is_list: bool = False) -> str:
    """The text with its control characters written as in a Python string, but for breaks before lines of a list."""
    if is_list:
        return '\n  '.join(map(escape, text.split('\n  ')))
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; OSError if there is none or it is sparse: reading other things could block or never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # not opened: that alone can act on a device
        raise OSError(f'{path.name} is no file')
    file = path.open('rb')
    status = os.fstat(file.fileno())
    if hasattr(os, 'SEEK_HOLE') and 100 * 512 * status.st_blocks < status.st_size:
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) < status.st_size:
            file.close()
            raise OSError(f'{path.name} is a sparse file')
        os.lseek(file.fileno(), 0, os.SEEK_SET)
    return file


def format_json(value: Any, width: int = 100, indent: str = '') -> str:
    """JSON with a line for each key, and for each mapping of a list; what fits in the width is one line."""
    text, deeper = json.dumps(value), f'{indent} '
    if len(indent + text) <= width:
        return text
    if isinstance(value, dict):
        lines = [f'{json.dumps(str(key))}: {format_json(item, width, deeper)}' for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = [format_json(item, width, deeper) for item in value]
    else:
        return text
    return text[0] + f'\n{deeper}' + f',\n{deeper}'.join(lines) + f'\n{indent}{text[-1]}'


def list_sums(files: Dict[str, bytes]) -> bytes:
    """The content of checksums.json for these files."""
    sums = {name: {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return f'{format_json(sums)}\n'.encode()


def find_change(folder: Path, names: Sequence[str] = ()) -> Optional[str]:
    """Describe the first of the named files, or of all, that differs from the folder's checksums.json, if any."""
    if not (folder / SUMS).exists():  # only a checkpoint of training always has it
        return f'{SUMS} is missing' if (folder / 'state.json').exists() else None
    try:
        for name, expected in read_mapping(folder / SUMS).items():
            if names and name not in names:
                continue
            if Path(name).name != name:
                return f'{SUMS} lists {name!r}, which is no name of a file in the folder'
            with open_regular(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected['bytes']:
                    return f'{name} has {size} bytes, not {expected["bytes"]!r}'
                digest = hashlib.sha256()
                while chunk := file.read(2**20):
                    digest.update(chunk)
                if digest.hexdigest() != expected['sha256']:
                    return f'{name} was changed'
    except (KeyError, OSError, TypeError, ValueError) as error:
        return str(error) if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'
    return None


def is_unvalidated(run: Path) -> bool:
    """Whether a run's folder has a last checkpoint, but no best one yet."""
    return (run / 'last' / 'model.safetensors').is_file() and not (run / 'best').exists()


def _load_yaml(data: bytes) -> Any:
    """Load YAML that is no deeper than `MAX_DEPTH` and has no aliases, by which a few lines can become gigabytes."""
    depth = 0
    for event in yaml.parse(data, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias or depth > MAX_DEPTH:
            what = f'an alias, *{event.anchor}' if is_alias else f'more than {MAX_DEPTH} levels'
            raise ValueError(f'it has {what}: write the values out, a line for each')
    content = yaml.safe_load(data)
    repr(content)  # a ValueError for an integer of too many digits, which no message could show
    return content


def read_mapping(path: Path) -> Dict[str, Any]:
    """Read a JSON or YAML file that maps names to values.

    ValueError if it cannot be read, is larger or deeper than such files are, or is no mapping.
    """
    limit, load = (MAX_JSON, json.loads) if path.suffix == '.json' else (MAX_YAML, _load_yaml)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise OSError(f'{path.name} has {size:,} bytes, more than {limit:,}')
            content = load(file.read(size))
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read '{path}' ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot read '{path}': it maps no names to values")
    return content


def read_key(path: Path, *keys: str) -> Any:
    """The value at nested keys of a file that `read_mapping` reads; None if it cannot be read or lacks one."""
    try:
        value = read_mapping(path)
        for key in keys:
            value = value[key]
    except (KeyError, TypeError, ValueError):
        return None
    return value


def read_tensors(path: Path) -> Dict[str, torch.Tensor]:
    """The tensors of a safetensors file; ValueError if it cannot be read, or is no such file."""
    try:
        open_regular(path).close()
        return safetensors.torch.load_file(path)
    except (KeyError, OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read '{path}' ({type(error).__name__}: {error})") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file, in the place of whatever had its name, and flush it to the disk."""
    path.unlink(missing_ok=True)  # a link would lead elsewhere, and another name of the file would change with it
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666), 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically; OSError if it cannot be written, as on a full disk."""
    scratch = path.with_name(f'.{path.name}.part')
    try:
        write_bytes(scratch, data)
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def open_to_append(path: Path) -> BinaryIO:
    """Open a file of ours to write at its end, or make it; OSError if it is no file, a link, or has two names."""
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _FLAGS, 0o666), 'ab')
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        file.close()
        raise OSError(f'{path.name} is no file, or one that has another name too: remove it')
    return file


def check_own(folder: Path, links: Sequence[str] = ()) -> None:
    """Refuse a folder of ours with links, pipes or devices, which a writer or a removal could follow elsewhere.

    Allowed are `links`, names in it of links to its folder checkpoints, and links in its folder wandb. Nothing is
    checked if there is no folder. A ValueError names what is refused.
    """
    if folder.is_symlink():
        raise ValueError(f"'{folder}' is a link: name '{os.readlink(folder)}' itself")
    for place, folders, files in walk(folder, follows=False):
        for path in (Path(place, name) for name in [*folders, *files]):
            if path.is_symlink() and not path.parent.is_relative_to(folder / 'wandb'):
                target = Path(os.readlink(path))
                is_own = path.parent == folder and path.name in links
                if not is_own or target.parent != Path('checkpoints') or target.name in ('', '..'):
                    raise ValueError(f"'{path}' is a link to '{target}', which is not ours: remove it")


def walk(folder: os.PathLike, follows: bool = True) -> Iterator[Tuple[str, List[str], List[str]]]:
    """A folder and those below it, through links if it `follows` them: a path, and the names of its folders and files.

    ValueError for what need not end: a pipe or a device, and a folder that links lead to a second time.
    """
    pending, known = [os.fspath(folder)], set()
    for place in pending:
        folders, files = [], []
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # another process may remove it
            if (key := os.stat(place)[1:3]) in known:
                raise ValueError(f"links lead to '{place}' a second time: remove one")
            known.add(key)
            for entry in os.scandir(place):
                if not entry.is_dir() and not entry.is_file() and os.path.exists(entry):
                    raise ValueError(f"'{entry.path}' is a pipe or a device: remove it")
                (folders if entry.is_dir(follow_symlinks=follows) else files).append(entry.name)
        pending += [os.path.join(place, name) for name in folders]
        yield place, folders, files


def check_writable(path: Path) -> None:
    """Check that a file can be written, before the work that makes its content; ValueError if not."""
    folder = path.parent
    if path.exists() and not path.is_file():  # whoever may write to /dev would replace a device
        raise ValueError(f"cannot write '{path}': it is a {'folder' if path.is_dir() else 'pipe or a device'}")
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
        if isinstance(file, (str, os.PathLike)):
            open_regular(Path(file)).close()
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise OSError(f'it has {image.width} x {image.height} pixels, more than {max_pixels:,}')
            if image.mode.startswith('I'):  # which Pillow would clip to 255
                levels = np.asarray(image).clip(0, 65535).astype(np.uint32)
                image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
            return image.convert(mode)
    except OSError:
        raise
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise OSError(f'it is damaged: {error or type(error).__name__}') from error
