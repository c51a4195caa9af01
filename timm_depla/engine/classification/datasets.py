"""The data sets of classification: open and count folders, tar files, streams and timm's other data sets."""

import logging
import os
import tarfile
from argparse import Namespace
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, Tuple

from timm.data import ImageDataset, create_dataset
from timm.utils.misc import natural_key

from timm_depla.data import UNREADABLE, check_data, check_source, few, find_split, inspect_images, open_folder
from timm_depla.errors import ConfigError, as_config_error, require
from timm_depla.files import MODES, escape, walk

from ..batches import max_unreadable
from ..config import updated
from ..distributed import World

_logger = logging.getLogger(__name__)

MAX_CHECKED = 20_000  # images of a split that are all read before training, in a minute or two


def _check_data(args: Namespace, kind: str, split: str) -> None:
    """Refuse data that is not there, or that cannot or must not be read."""
    if kind == 'tfds':
        raise ConfigError('tfds/ reads by TensorFlow, whose order cannot be restored: convert to WebDataset')
    if kind == 'wds':
        check_source(str(args.data_dir or ''))
        check_source(split)
    if args.class_map and not any(Path(place, args.class_map).is_file() for place in ('', args.data_dir or '')):
        raise ConfigError(f"no file '{args.class_map}': check --class-map")
    if args.class_map.lower().endswith('.pkl'):
        raise ConfigError(f"--class-map '{args.class_map}' is a pickle, which is not read: write it as a text file")
    if kind in ('', 'wds') and not Path(args.data_dir or '').exists() and '://' not in str(args.data_dir):
        raise ConfigError(f"no data folder '{args.data_dir}'")
    if args.val_fraction and (args.dataset or _split_path(args, split).is_file()):
        raise ConfigError('--val-fraction divides a folder of images, nothing else: name the splits')


def image_mode(args: Namespace) -> str:
    """Pillow's mode of the images: the one asked for, or that of the model's channels."""
    return args.input_img_mode or MODES.get(args.in_chans, 'RGB')


def _is_stream(args: Namespace) -> bool:
    """Whether the data set has no random access."""
    return args.dataset.lower().startswith(('wds/', 'hfids/'))


def _has_folders(args: Namespace) -> bool:
    """Whether the splits are folders or tar files of `args.data_dir`."""
    return args.dataset.lower() in ('', 'torch/image_folder', 'torch/folder')


def _split_path(args: Namespace, split: str) -> Path:
    return find_split(Path(args.data_dir), split, bool(args.val_fraction))


def split_name(args: Namespace, split: str) -> str:
    """The name of what is read for a split: of its folder or tar file where it has one."""
    return _split_path(args, split).name if _has_folders(args) else split


def open_split(args: Namespace, split: str, is_training: bool = False, epoch: int = 0) -> Any:
    """One split of the data: a folder or SPLIT.tar of images, or a data set that timm names.

    A stream is shuffled by the epoch in training. ConfigError if it cannot be opened, or its source is not allowed.
    """
    kind = args.dataset.partition('/')[0].lower()
    _check_data(args, kind, split)
    options: Dict[str, Any] = {} if kind == 'torch' else {'input_img_mode': image_mode(args)}
    if args.class_map:
        options['class_map'] = args.class_map
    if args.dataset_download:
        options['download'] = True
    if kind in ('wds', 'hfds', 'hfids'):
        require('webdataset' if kind == 'wds' else 'datasets', 'stream')
    if kind in ('hfds', 'hfids'):
        options['trust_remote_code'] = args.dataset_trust_remote_code
    if kind == 'hfds' or _is_stream(args):
        options.update(input_key=args.input_key, target_key=args.target_key)
    if _is_stream(args):
        number = args.train_num_samples if is_training else args.val_num_samples
        options.update(num_samples=number, seed=args.seed + epoch, batch_size=args.batch_size, is_training=is_training)
        options['repeats'] = getattr(args, 'epoch_repeats', 0)
    root = _split_path(args, split) if _has_folders(args) else args.data_dir
    kinds = AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError
    with as_config_error(f"cannot open the split '{split}' of '{args.dataset or root}': ", *kinds):
        if not _has_folders(args):
            if os.path.isdir(root or ''):
                next(walk(root))  # a stream reads no folders below
            return create_dataset(args.dataset, root=root, split=split, **options)
        if not kind and root.is_dir():
            fraction = args.val_fraction if split != '.' else 0
            return open_folder(root, fraction=fraction or 0, part=split == args.val_split, **options)
        check_data(root)
        return create_dataset(args.dataset, root=str(root), split=split, search_split=False, **options)


def _count_samples(args: Namespace, split: str) -> int:
    """Count the images of a stream of unknown length: by file names in local shards, else by reading the stream."""
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


def open_counted(args: Namespace, kind: str) -> Tuple[Namespace, Any]:
    """Open the split 'train' or 'val'; the arguments get the length of a stream that does not state its own.

    ConfigError if it cannot be opened or counted.
    """
    split, key = getattr(args, f'{kind}_split'), f'{kind}_num_samples'
    try:
        return args, open_split(args, split, is_training=kind == 'train')
    except ConfigError as error:
        if 'num_samples' not in str(error) or getattr(args, key) or not _is_stream(args):
            raise
    number, flag = _count_samples(args, split), f'--{key.replace("_", "-")}'
    _logger.info("counted %d images of '%s': %s saves the counting", number, split, flag)
    args = updated(args, **{key: number})
    return args, open_split(args, split, is_training=kind == 'train')


def class_names(dataset: Any) -> Any:
    """The classes of a data set, by name or index; empty if unknown."""
    reader = getattr(dataset, 'reader', None)
    known = (getattr(reader, name, None) for name in ('class_to_idx', 'class_name_to_idx'))
    return next(filter(None, known), None) or getattr(dataset, 'classes', ())


def file_names(dataset: Any) -> List[str]:
    """The file names of a data set's images in their order; empty if unknown."""
    has_files = isinstance(dataset, ImageDataset) and hasattr(dataset.reader, 'samples')  # of a folder or a tar file
    return dataset.filenames() if has_files else []


def open_splits(args: Namespace) -> Tuple[Namespace, Any, Any]:
    """The arguments with the lengths of streams, the training and the validation split.

    ConfigError if one cannot be opened, both are the same folder, or their classes differ.
    """
    names = args.train_split, args.val_split
    args, train_set = open_counted(args, 'train')
    args, val_set = open_counted(args, 'val')
    if args.val_fraction and '.' in names:
        raise ConfigError("--val-fraction divides the folder: leave out --train-split and --val-split '.'")
    if _has_folders(args) and not args.val_fraction and len({_split_path(args, name) for name in names}) == 1:
        raise ConfigError(
            f"training and validation would both read '{_split_path(args, names[1])}': expected the folders "
            f"'{names[0]}' and '{names[1]}' in '{args.data_dir}'"
        )
    known = [set(class_names(dataset)) for dataset in (train_set, val_set)]
    differing = zip(names, (known[0] - known[1], known[1] - known[0]), strict=True)
    if alone := [f"{few(sorted(map(str, classes)))} in '{name}' alone" for name, classes in differing if classes]:
        raise ConfigError(
            f"the splits of '{args.data_dir}' differ in their classes, {'; '.join(alone)}: add images of them to the "
            'other split, remove their folders, or list all classes in a file, one a line, for --class-map'
        )
    return args, train_set, val_set


def check_images(args: Namespace, world: World, *datasets: Any) -> None:
    """Read all images of the folders of a new run, if they are not too many, and name those with something to say.

    ConfigError, which lists all, if more of a split cannot be read than training may skip.
    """
    for split, dataset in zip((args.train_split, args.val_split), datasets, strict=True):
        samples = getattr(getattr(dataset, 'reader', None), 'samples', [])
        if args.dataset or len(samples) > MAX_CHECKED or not isinstance(samples[0][0], str):
            continue
        files = [file for file, _ in samples][world.rank :: world.size]
        shares, by_kind = world.broadcast(world.gather(inspect_images(files, args.workers))), defaultdict(list)
        for file, kind, text in chain(*shares):
            by_kind[kind].append(f'{os.path.relpath(file, dataset.reader.root)}{text}')
        for kind, names in sorted(by_kind.items(), key=lambda item: item[0] == UNREADABLE):
            text = f"{len(names)} of the {len(samples)} images of the split '{split}' {kind}"
            listed = ''.join(f'\n  {escape(name)}' for name in sorted(names, key=natural_key))
            if kind == UNREADABLE and len(names) > max_unreadable(len(samples)):
                raise ConfigError(f'{text}; replace or remove them:{listed}')
            _logger.info(f'{text}:{listed}')


def count_classes(args: Namespace, dataset: Any) -> int:
    """The number of classes of a data set; ConfigError if it is not given, or `args.num_classes` is too small."""
    known = class_names(dataset)
    if not (args.num_classes or known):
        raise ConfigError(f"'{args.dataset}' does not say how many classes it has: give --num-classes")
    if args.num_classes and args.num_classes < len(known):
        raise ConfigError(f"--num-classes {args.num_classes} is too few: '{args.data_dir}' has {len(known)} classes")
    if (args.num_classes or len(known)) < 2:
        raise ConfigError(f"'{args.data_dir}' has one class: a classifier needs two to tell apart")
    return args.num_classes or len(known)
