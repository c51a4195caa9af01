"""The data sets of classification: open and count folders, tar files, streams and timm's other data sets."""

import logging
import re
import tarfile
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any, Dict, List, Tuple

from PIL import EpsImagePlugin
from timm.data import ImageDataset, create_dataset
from timm.data.readers import add_img_extensions

from timm_depla.data import digits_folder

from ..config import updated
from ..errors import ConfigError

__all__ = [
    'class_names', 'count_classes', 'count_streams', 'embedded_digits', 'file_names', 'find_data', 'image_mode',
    'open_split', 'open_splits', 'split_name',
]  # fmt: skip

_logger = logging.getLogger(__name__)

_STREAMS = ('wds/', 'hfids/')
EpsImagePlugin.gs_binary = False  # timm decodes streams in any format: none may run Ghostscript
add_img_extensions(('.webp', '.bmp', '.tif', '.tiff'))
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
_VALIDATION = ('validation', 'val', 'valid', 'test')
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


def find_split(args: Namespace, split: str) -> Path:
    """The folder or tar file of a split in `args.data_dir`; 'validation' may also be called val, valid or test.

    Raises:
        ConfigError: If there is none: reading the whole folder instead would mix training and validation.
    """
    root = Path(args.data_dir)
    for name in _VALIDATION if split == _VALIDATION[0] else (split,):
        for path in (root / name, root / f'{name}.tar'):
            if path.exists():
                return path
    children = sorted(root.iterdir()) if root.is_dir() else []
    found = [path.name for path in children if path.is_dir() or path.suffix == '.tar']
    raise ConfigError(
        f"no folder or tar file '{split}' in '{root}', which has {', '.join(found[:8]) or 'none'}"
        f'{", ..." if len(found) > 8 else ""}: name the split with --train-split, --val-split or --split '
        "('.' is the folder itself)"
    )


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
    try:
        options.update({'download': True} if args.dataset_download else {})
        root = str(find_split(args, split)) if has_folders(args) else args.data_dir
        return create_dataset(args.dataset, root=root, split=split, search_split=not has_folders(args), **options)
    except ModuleNotFoundError as error:
        raise ConfigError(f'data set \'{args.dataset}\': {error}; pip install "timm-depla[stream]"') from error
    except ConfigError:
        raise
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        if kind:
            raise ConfigError(f"cannot open the split '{split}' of '{args.dataset}': {error}") from error
        raise ConfigError(
            f"no classes with images for the split '{split}' in '{args.data_dir}': "
            f'expected {Path(args.data_dir) / split}/CLASS/IMAGE'
        ) from error


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
    if has_folders(args) and find_split(args, args.train_split) == find_split(args, args.val_split):
        raise ConfigError(
            f"training and validation would both read '{find_split(args, args.val_split)}': expected the folders "
            f"'{args.train_split}' and '{args.val_split}' in '{args.data_dir}'"
        )
    classes = [set(class_names(dataset)) for dataset in (train_set, val_set)]
    if classes[0] != classes[1]:
        differing = map(str, sorted(classes[0] ^ classes[1], key=str))
        raise ConfigError(f"the splits of '{args.data_dir}' differ in the classes {', '.join(islice(differing, 5))}")
    return train_set, val_set


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
