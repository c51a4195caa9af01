"""The data sets of classification: open and count folders, tar files, streams and timm's other data sets."""

import logging
import os
import re
import tarfile
from argparse import Namespace
from collections import Counter, defaultdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple

from PIL import EpsImagePlugin
from timm.data import ImageDataset, create_dataset
from timm.data.readers import add_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import is_img_extension
from timm.utils.misc import natural_key

from timm_depla.data import UNREADABLE, digits_folder, inspect_images
from timm_depla.errors import ConfigError
from timm_depla.files import escape

from ..batches import max_unreadable
from ..config import VALIDATION, find_name, updated
from ..distributed import World

__all__ = [
    'check_images', 'class_names', 'count_classes', 'count_streams', 'embedded_digits', 'file_names', 'find_data',
    'image_mode', 'is_image', 'open_split', 'open_splits', 'split_name',
]  # fmt: skip

_logger = logging.getLogger(__name__)

_STREAMS = ('wds/', 'hfids/')
EpsImagePlugin.gs_binary = False  # timm decodes streams in any format: none may run Ghostscript
add_img_extensions(('.webp', '.bmp', '.tif', '.tiff', '.gif'))
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
MAX_CHECKED = 20_000  # images of a split that are all read before training, in a minute or two
SCHEMES = ('https', 'http', 'hf', 's3', 'gs')  # of streams; webdataset has more, one of which runs any command


def embedded_digits() -> str:
    """The folder of the embedded digits.

    Raises:
        ConfigError: If they cannot be written.
    """
    try:
        return str(digits_folder())
    except (ModuleNotFoundError, OSError, RuntimeError) as error:
        raise ConfigError(str(error)) from error


def find_data(args: Namespace) -> str:
    """The data folder of a training run: the one given, or the embedded digits.

    Raises:
        ConfigError: If the digits cannot be written.
    """
    if args.data_dir or args.dataset:
        return args.data_dir
    _logger.info('no data folder given: training on the embedded handwritten digits')
    return embedded_digits()


def check_source(source: str) -> None:
    """Refuse a stream address that webdataset would run as a command or pass to a shell.

    Raises:
        ConfigError: If its scheme is not one of `SCHEMES`, or it has characters that a shell interprets.
    """
    scheme = re.match(r'\s*([A-Za-z][\w+.-]+):', source)
    if scheme and scheme[1].lower() not in SCHEMES:
        known = ', '.join(f'{name}://' for name in SCHEMES)
        raise ConfigError(f"'{source}' is not read: a stream is a local folder or one of {known}")
    if scheme and not re.fullmatch(r'[\w./:{}%,~@+=-]+', source):
        raise ConfigError(f"'{source}' is not read: an address has letters, digits and ./:{{}}%,~@+=- alone")


def image_mode(args: Namespace) -> str:
    """Pillow's mode of the images: the one asked for, or that of the model's channels."""
    return args.input_img_mode or _MODES.get(args.in_chans, 'RGB')


def few(names: Iterable[str], count: int = 5) -> str:
    """The first names, quoted, and how many more there are."""
    names = list(names)
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(f"'{name}'" for name in names[:count]) + more


def find_split(args: Namespace, split: str) -> Path:
    """The folder or tar file of a split in `args.data_dir`: in any case, 'validation' also as val, valid or test.

    With `args.val_fraction`, it is the folder that is divided: train, or all of `args.data_dir`.

    Raises:
        ConfigError: If there is none: reading the whole folder instead would mix training and validation.
    """
    root = Path(args.data_dir)
    if split == '.' or ((root / split).exists() and not args.val_fraction):
        return root / split
    children = sorted(root.iterdir()) if root.is_dir() else []
    files = {path.name.removesuffix('.tar'): path for path in children if path.is_dir() or path.suffix == '.tar'}
    train, validation = find_name('train', files), find_name(VALIDATION[0], files)
    if args.val_fraction:
        if train and validation:
            raise ConfigError(f"'{root}' has a validation split, '{validation}': leave out --val-fraction")
        return files[train] if train else root
    if name := find_name(split, files):
        return files[name]
    has_classes = any(is_image(file) for path in files.values() if path.is_dir() for file in islice(path.iterdir(), 99))
    is_whole = has_classes or (train and split in VALIDATION)
    offer = f"divide '{files[train].name if train else root}' by --val-fraction 0.2, or " if is_whole else ''
    found = few((path.name for path in files.values()), 8) or 'none'
    raise ConfigError(
        f"no folder or tar file '{split}' in '{root}', which has {found}: {offer}name the split with --train-split, "
        "--val-split or --split ('.' is the folder itself)"
    )


def is_image(file: os.PathLike) -> bool:
    """Whether timm's reader takes a file for an image, by the end of its name."""
    return is_img_extension(os.path.splitext(file)[1].lower())


def scan_folder(folder: Path, class_map: str) -> Tuple[Dict[str, int], List[str]]:
    """The classes of a folder, timm's: names of the folders that hold images; and sentences on what is not used.

    Raises:
        ConfigError: If there is no class with images, or the class map cannot be read.
    """
    counts, others, empty, loose = Counter(), [], [], []
    for place, folders, files in os.walk(folder, followlinks=True):
        images = [file for file in files if is_image(file)]
        others += sorted(os.path.relpath(os.path.join(place, file), folder) for file in set(files) - set(images))
        if place == str(folder):
            loose = sorted(images)
        elif images:
            counts[os.path.basename(place)] += len(images)
        elif not folders:
            empty.append(os.path.relpath(place, folder))
    try:
        classes = load_class_map(class_map, str(folder)) if class_map else None
    except (AssertionError, OSError, ValueError) as error:
        raise ConfigError(f"cannot read --class-map '{class_map}': {error}") from error
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


def divide(samples: List[Tuple[str, int]], folder: Path, fraction: float) -> List[bool]:
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


def open_folder(args: Namespace, split: str, folder: Path, **options: Any) -> ImageDataset:
    """A split in a folder, whose unused files are named in the log.

    Raises:
        ConfigError: If it has no classes with images.
    """
    classes, notes = scan_folder(folder, args.class_map)
    dataset = ImageDataset(str(folder), **{**options, 'class_map': classes})
    is_validation = split == args.val_split
    if args.val_fraction and split != '.':
        chosen = divide(dataset.reader.samples, folder, args.val_fraction)
        dataset.reader.samples = [
            sample
            for sample, is_chosen in zip(dataset.reader.samples, chosen, strict=True)
            if is_chosen is is_validation
        ]
    if notes and not (args.val_fraction and is_validation):
        _logger.info("'%s': not used: %s", folder, '; '.join(notes))
    return dataset


def has_folders(args: Namespace) -> bool:
    """Whether the splits are folders or tar files of `args.data_dir`."""
    return args.dataset.lower() in ('', 'torch/image_folder', 'torch/folder')


def split_name(args: Namespace, split: str) -> str:
    """The name of what is read for a split: of its folder or tar file where it has one."""
    return find_split(args, split).name if has_folders(args) else split


def open_split(args: Namespace, split: str, is_training: bool = False, epoch: int = 0) -> Any:
    """One split of the data: a folder or SPLIT.tar of images, or a data set that timm names.

    Args:
        args: The run's arguments.
        split: The split's name.
        is_training: Whether a stream is shuffled.
        epoch: The epoch of a stream.

    Raises:
        ConfigError: If it cannot be opened, or its source is not allowed.
    """
    kind = args.dataset.partition('/')[0].lower()
    if kind == 'tfds':
        raise ConfigError('tfds/ reads by TensorFlow, whose order cannot be restored: convert to WebDataset')
    if kind == 'wds':
        check_source(str(args.data_dir or ''))
        check_source(split)
    if args.class_map and not any(Path(place, args.class_map).is_file() for place in ('', args.data_dir or '')):
        raise ConfigError(f"no file '{args.class_map}': check --class-map")
    if Path(args.class_map).suffix == '.pkl':
        raise ConfigError(f"--class-map '{args.class_map}' is a pickle, which is not read: write it as a text file")
    if kind in ('', 'wds') and not Path(args.data_dir or '').exists() and '://' not in str(args.data_dir):
        raise ConfigError(f"no data folder '{args.data_dir}'")
    number = args.train_num_samples if is_training else args.val_num_samples
    options: Dict[str, Any] = {}
    if args.dataset.lower().startswith(_STREAMS):
        options = dict(input_key=args.input_key, target_key=args.target_key, num_samples=number)
        options.update(seed=args.seed + epoch, batch_size=args.batch_size, is_training=is_training)
        options['repeats'] = getattr(args, 'epoch_repeats', 0)
    elif kind == 'hfds':
        options = dict(input_key=args.input_key, target_key=args.target_key)
    if kind in ('hfds', 'hfids'):
        options['trust_remote_code'] = args.dataset_trust_remote_code
    if kind != 'torch':
        options['input_img_mode'] = image_mode(args)
    if args.class_map:
        options['class_map'] = args.class_map
    if args.val_fraction and (args.dataset or find_split(args, split).is_file() or not 0 < args.val_fraction < 1):
        raise ConfigError('--val-fraction divides a folder of images, nothing else: name the splits')
    try:
        options.update({'download': True} if args.dataset_download else {})
        root = find_split(args, split) if has_folders(args) else args.data_dir
        if not kind and Path(root).is_dir():
            return open_folder(args, split, root, **options)
        return create_dataset(
            args.dataset, root=root and str(root), split=split, search_split=not has_folders(args), **options
        )
    except ModuleNotFoundError as error:
        raise ConfigError(f'data set \'{args.dataset}\': {error}; pip install "timm-depla[stream]"') from error
    except ConfigError:
        raise
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot open the split '{split}' of '{args.dataset or root}': {error}") from error


def count_samples(args: Namespace, split: str) -> int:
    """Count the images of a stream of unknown length: by file names in local shards, else by reading the stream.

    Raises:
        ConfigError: If its shards are not local files.
    """
    if not args.dataset.lower().startswith('wds/'):
        import datasets

        builder = datasets.load_dataset_builder(args.dataset.partition('/')[2], cache_dir=args.data_dir)
        return sum(1 for _ in builder.as_streaming_dataset(split=split))
    reader = open_split(args, split).reader
    suffixes = tuple(f'.{key}' for key in reader.input_key.split(';'))
    total = 0
    for name in reader.split_info.filenames:
        path = Path(args.data_dir, name)
        if not path.is_file():
            raise ConfigError(f"the length of '{path}' is not known: give --train-num-samples")
        with tarfile.open(path) as shard:
            total += sum(member.name.lower().endswith(suffixes) for member in shard)
    return total


def count_streams(args: Namespace, *splits: str) -> Namespace:
    """Return the arguments with the counted lengths of streams of unknown length.

    Args:
        args: The run's arguments.
        *splits: The splits to count: 'train', 'val' or both.

    Raises:
        ConfigError: If a stream cannot be opened or counted.
    """
    for kind in splits if args.dataset.lower().startswith(_STREAMS) else ():
        split, key = getattr(args, f'{kind}_split'), f'{kind}_num_samples'
        try:
            open_split(args, split, is_training=kind == 'train')
        except ConfigError as error:
            if 'num_samples' not in str(error) or getattr(args, key):
                raise
            args = updated(args, **{key: count_samples(args, split)})
            flag = f'--{key.replace("_", "-")}'
            _logger.info("counted %d images of '%s': %s saves the counting", getattr(args, key), split, flag)
    return args


def class_names(dataset: Any) -> Any:
    """The classes of a data set, by name or index; empty if unknown."""
    reader = getattr(dataset, 'reader', None)
    known = (getattr(reader, name, None) for name in ('class_to_idx', 'class_name_to_idx'))
    return next(filter(None, known), None) or getattr(dataset, 'classes', ())


def file_names(dataset: Any) -> List[str]:
    """The file names of a data set's images in their order; empty if unknown."""
    has_files = isinstance(dataset, ImageDataset) and hasattr(dataset.reader, 'samples')  # of a folder or a tar file
    return dataset.filenames() if has_files else []


def open_splits(args: Namespace) -> Tuple[Any, Any]:
    """The training and the validation split.

    Raises:
        ConfigError: If one cannot be opened, both are the same folder, or their classes differ.
    """
    train_set, val_set = open_split(args, args.train_split, is_training=True), open_split(args, args.val_split)
    if args.val_fraction and '.' in (args.train_split, args.val_split):
        raise ConfigError("--val-fraction divides the folder: leave out --train-split and --val-split '.'")
    folders = has_folders(args) and not args.val_fraction
    if folders and find_split(args, args.train_split) == find_split(args, args.val_split):
        raise ConfigError(
            f"training and validation would both read '{find_split(args, args.val_split)}': expected the folders "
            f"'{args.train_split}' and '{args.val_split}' in '{args.data_dir}'"
        )
    classes = [set(class_names(dataset)) for dataset in (train_set, val_set)]
    splits = (args.train_split, classes[0] - classes[1]), (args.val_split, classes[1] - classes[0])
    if alone := [f"{few(sorted(map(str, names)))} in '{split}' alone" for split, names in splits if names]:
        raise ConfigError(
            f"the splits of '{args.data_dir}' differ in their classes, {'; '.join(alone)}: add images of them to the "
            'other split, remove their folders, or list all classes in a file, one a line, for --class-map'
        )
    return train_set, val_set


def check_images(args: Namespace, world: World, *datasets: Any) -> None:
    """Read all images of the folders of a new run, if they are not too many, and name those with something to say.

    Args:
        args: The run's arguments.
        world: The processes that share the reading.
        *datasets: The splits.

    Raises:
        ConfigError: If more images of a split cannot be read than training may skip; it lists all.
    """
    for split, dataset in zip((args.train_split, args.val_split), datasets, strict=True):
        samples = getattr(getattr(dataset, 'reader', None), 'samples', [])
        if args.dataset or len(samples) > MAX_CHECKED or not isinstance(samples[0][0], str):
            continue
        files = [file for file, _ in samples][world.rank :: world.size]
        found = world.broadcast(
            [pair for part in world.gather(inspect_images(files, args.workers)) or [] for pair in part]
        )
        by_kind = defaultdict(list)
        for file, kind, text in found:
            by_kind[kind].append(f'{os.path.relpath(file, dataset.reader.root)}{text}')
        for kind, names in sorted(by_kind.items(), key=lambda item: item[0] == UNREADABLE):
            text = f"{len(names)} of the {len(samples)} images of the split '{split}' {kind}"
            listed = ''.join(f'\n  {escape(name)}' for name in sorted(names, key=natural_key))
            if kind == UNREADABLE and len(names) > max_unreadable(len(samples)):
                raise ConfigError(f'{text}; replace or remove them:{listed}')
            _logger.info('%s:%s', text, listed)


def count_classes(args: Namespace, dataset: Any) -> int:
    """The number of classes of a data set.

    Raises:
        ConfigError: If neither the data nor `args.num_classes` tells it, or `args.num_classes` is too small.
    """
    known = class_names(dataset)
    if not (args.num_classes or known):
        raise ConfigError(f"'{args.dataset}' does not say how many classes it has: give --num-classes")
    if args.num_classes and args.num_classes < len(known):
        raise ConfigError(f"--num-classes {args.num_classes} is too few: '{args.data_dir}' has {len(known)} classes")
    if (args.num_classes or len(known)) < 2:
        raise ConfigError(f"'{args.data_dir}' has one class: a classifier needs two to tell apart")
    return args.num_classes or len(known)
