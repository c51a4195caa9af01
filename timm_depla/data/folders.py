"""Folders of images: their splits, the classes of a split, the division of one without splits, and embedded data."""

import logging
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

from filelock import FileLock
from timm.data import ImageDataset
from timm.data.readers import add_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import is_img_extension
from timm.utils.misc import natural_key

from timm_depla.errors import ConfigError, as_config_error
from timm_depla.files import escape, walk

__all__ = ['check_data', 'check_source', 'few', 'find_annotations', 'find_images', 'find_split', 'open_folder']

_logger = logging.getLogger(__name__)

SCHEMES = ('https', 'http', 'hf', 's3', 'gs')  # of streams; webdataset has more, one of which runs any command
MAX_SHARDS = 10**6  # files that braces in an address stand for
VALIDATION = ('validation', 'val', 'valid', 'test')  # names of a validation split
add_img_extensions(('.webp', '.bmp', '.tif', '.tiff', '.gif'))


def is_image(file: os.PathLike) -> bool:
    """Whether timm's reader takes a file for an image, by the end of its name."""
    return is_img_extension(os.path.splitext(file)[1].lower())


def find_images(folder: os.PathLike) -> List[Path]:
    """All images below a folder, by name; ConfigError if there are none."""
    with as_config_error():
        files = sorted(Path(place, name) for place, _, names in walk(folder) for name in names if is_image(name))
    if not files:
        raise ConfigError(f"no images in '{folder}'")
    return files


def check_data(root: Path) -> None:
    """Check what timm reads: a folder, by `walk`, or a tar file, beside which it keeps a list; raises ValueError."""
    list(walk(root))
    if root.suffix == '.tar' and (kept := root.with_name(f'_{root.stem}_tarinfos.pickle')).is_symlink():
        raise ValueError(f"'{kept}' is a link: remove it")


def check_source(source: str) -> None:
    """Refuse, by a ConfigError, a stream address that webdataset would run, pass to a shell or expand without end."""
    scheme = re.match(r'\s*([A-Za-z][\w+.-]+):', source)
    if scheme and scheme[1].lower() not in SCHEMES:
        known = ', '.join(f'{name}://' for name in SCHEMES)
        raise ConfigError(f"'{source}' is not read: a stream is a local folder or one of {known}")
    if scheme and not re.fullmatch(r'[\w./:{}%,~@+=-]+', source):
        raise ConfigError(f"'{source}' is not read: an address has letters, digits and ./:{{}}%,~@+=- alone")
    shards = 1.0
    for start, end, rest in re.findall(r'\{(?:(-?\d+)\.\.(-?\d+))?([^{}]*)', source):
        shards *= abs(float(end) - float(start)) + 1 if start else 52 if '..' in rest else rest.count(',') + 1
    if not shards <= MAX_SHARDS:
        raise ConfigError(f"'{source}' is not read: its braces stand for more than {MAX_SHARDS:,} files")


def few(names: Iterable[str], count: int = 5) -> str:
    """The first names, quoted, and how many more there are."""
    names = list(names)
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(f"'{escape(name)}'" for name in names[:count]) + more


def _find_name(split: str, names: Iterable[str]) -> Optional[str]:
    """The name of a split, in any case; a validation split may have any name of `VALIDATION`. None if there is none."""
    known = {name.lower(): name for name in names}
    wanted = (split, *VALIDATION) if split.lower() in VALIDATION else (split,)
    return next((known[name.lower()] for name in wanted if name.lower() in known), None)


def find_split(root: Path, split: str, is_divided: bool = False) -> Path:
    """The folder or tar file of a split in a data folder: in any case, 'validation' also as val, valid or test.

    The split '.' is the data folder itself. `is_divided` finds what is divided into the splits: train, or the whole
    data folder. ConfigError if there is none: reading the whole folder instead would mix training and validation.
    """
    if split == '.' or ((root / split).exists() and not is_divided):
        return root / split
    children = sorted(root.iterdir()) if root.is_dir() else []
    files = {path.name.removesuffix('.tar'): path for path in children if path.is_dir() or path.suffix == '.tar'}
    train, validation = _find_name('train', files), _find_name(VALIDATION[0], files)
    if is_divided:
        if train and validation:
            raise ConfigError(f"'{root}' has a validation split, '{validation}': leave out --val-fraction")
        return files[train] if train else root
    if name := _find_name(split, files):
        return files[name]
    has_classes = any(is_image(file) for path in files.values() if path.is_dir() for file in islice(path.iterdir(), 99))
    is_whole = has_classes or (train and split in VALIDATION)
    offer = f"divide '{files[train].name if train else root}' by --val-fraction 0.2, or " if is_whole else ''
    found = few((path.name for path in files.values()), 8) or 'none'
    raise ConfigError(
        f"no folder or tar file '{split}' in '{root}', which has {found}: {offer}name the split with --train-split, "
        "--val-split or --split ('.' is the folder itself)"
    )


def find_annotations(root: Path, split: str) -> Tuple[str, Path]:
    """A split of COCO's format, in any case, with or without a year (val may be val2017): its name and annotations.

    ConfigError if there is none, or several.
    """
    files = sorted(Path(root, 'annotations').glob('instances_*.json'))
    found = {path.stem.removeprefix('instances_'): path for path in files}
    without_year = defaultdict(list)
    for name in found:
        without_year[name.rstrip('0123456789')].append(name)
    alike = without_year.get(_find_name(split.rstrip('0123456789'), without_year), [])
    if split in found or len(alike) == 1:
        name = split if split in found else alike[0]
        return name, found[name]
    raise ConfigError(
        f"no annotation file '{Path(root, 'annotations', f'instances_{split}.json')}': expected DIR/SPLIT and "
        'DIR/annotations/instances_SPLIT.json'
        + (f'; there are the splits {", ".join(found)}: name them with --train-split, --val-split' if found else '')
    )


def _scan(folder: Path, class_map: str) -> Tuple[Dict[str, int], List[str]]:
    """The classes of a folder, timm's: names of the folders that hold images; and sentences on what is not used."""
    counts, others, empty, loose = Counter(), [], [], []
    for place, folders, files in walk(folder):
        images = [file for file in files if is_image(file)]
        others += sorted(os.path.relpath(os.path.join(place, file), folder) for file in set(files) - set(images))
        if place == str(folder):
            loose = sorted(images)
        elif images:
            counts[os.path.basename(place)] += len(images)
        elif not folders:
            empty.append(os.path.relpath(place, folder))
    with as_config_error(f"cannot read --class-map '{class_map}': ", AssertionError, OSError, ValueError):
        classes = load_class_map(class_map, str(folder)) if class_map else None
    classes = classes or {name: index for index, name in enumerate(sorted(counts, key=natural_key))}
    kinds = Counter(Path(name).suffix.lower() or 'without a suffix' for name in others)
    unused = {
        f'files of other kinds ({", ".join(f"{n} {kind}" for kind, n in kinds.most_common())})': others,
        f'images in no folder of a class ({len(loose)})': loose,
        f'folders of classes without images ({len(empty)})': sorted(empty, key=natural_key),
        f"classes that are not in '{class_map}'": sorted(counts.keys() - classes.keys(), key=natural_key),
    }
    notes = [f'{text}: {few(names)}' for text, names in unused.items() if names]
    if not counts.keys() & classes.keys():
        found = f'; it has {"; ".join(notes)}' if notes else ''
        raise ConfigError(f"no classes with images in '{folder}': expected {folder}/CLASS/IMAGE{found}")
    return classes, notes


def _divide(samples: List[Tuple[str, int]], folder: Path, fraction: float) -> List[bool]:
    """Whether each image is for validation: those of its class whose names have the lowest hashes.

    An image keeps its part when others are added. A class has at least one image in each part, if it has two.
    """
    ranked = defaultdict(list)
    for index, (file, label) in enumerate(samples):
        name = os.path.relpath(file, folder).replace(os.sep, '/').encode(errors='surrogateescape')
        ranked[label].append((int.from_bytes(sha256(name).digest()[:8], 'big') / 2**64, index))
    chosen = [False] * len(samples)
    for ranks in ranked.values():
        below = sum(rank < fraction for rank, _ in ranks)
        for _, index in sorted(ranks)[: min(max(below, 1), len(ranks) - 1)]:
            chosen[index] = True
    return chosen


def open_folder(folder: Path, class_map: str = '', fraction: float = 0.0, part: int = 0, **kwargs: Any) -> ImageDataset:
    """timm's data set of a folder CLASS/IMAGE; the log names files in it that are not used.

    Args:
        folder: The folder.
        class_map: A file that maps names of classes to indices.
        fraction: The share of each class that is for validation; 0 takes the whole folder.
        part: The part of a divided folder: 0 for training, 1 for validation.
        **kwargs: Arguments of `ImageDataset`.

    Raises:
        ConfigError: If there is no class with images, or the class map cannot be read.
    """
    classes, notes = _scan(folder, class_map)
    dataset = ImageDataset(str(folder), class_map=classes, **kwargs)
    samples = dataset.reader.samples
    if fraction:
        chosen = _divide(samples, folder, fraction)
        dataset.reader.samples = [sample for sample, of in zip(samples, chosen, strict=True) if of == bool(part)]
    if notes and not (fraction and part):
        _logger.info("'%s': not used: %s", folder, '; '.join(notes))
    return dataset


def write_once(
    root: Optional[os.PathLike], name: str, is_whole: Callable[[Path], bool], write: Callable[[Path], None]
) -> Path:
    """The folder of an embedded data set, which the first of several processes writes; ConfigError if it cannot.

    Args:
        root: The folder; NAME in `$XDG_CACHE_HOME/timm_depla` (by default under `~/.cache`) when None.
        name: The data set's name.
        is_whole: Whether a folder holds the data set.
        write: Writes it to a new folder.
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    root = Path(root) if root is not None else cache / 'timm_depla' / name
    if is_whole(root):
        return root
    with as_config_error(f"cannot write '{root}': ", OSError):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f'.{root.name}.lock')), tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            if is_whole(root):  # another process was faster
                return root
            if any(root.iterdir()):
                _logger.warning('%s is incomplete or was changed; writing it again', root)
            write(Path(scratch))
            for part in sorted(Path(scratch).iterdir(), reverse=True):
                shutil.rmtree(root / part.name, ignore_errors=True)
                part.rename(root / part.name)
    return root
