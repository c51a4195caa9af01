"""COCO-format data for training and validating detectors, in an order that can be resumed."""

import logging
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from timm_depla.data import UnreadableError, read_or_next
from timm_depla.data.scenes import scenes_folder
from timm_depla.detection.coco import CocoDetection, create_transform
from timm_depla.errors import ConfigError

from ..batches import ResumableLoader, UnreadableImages, loader_kwargs
from ..config import find_name
from ..distributed import World

__all__ = [
    'DetectionLoader',
    'ValidationLoader',
    'annotated_split',
    'embedded_scenes',
    'find_data',
    'open_split',
    'open_splits',
]

_logger = logging.getLogger(__name__)

Batch = Tuple[List[Tensor], List[Dict[str, Any]]]  # images (3, H, W), targets of CocoDetection


def embedded_scenes() -> str:
    """The folder of the digits in scenes.

    Raises:
        ConfigError: If they cannot be written.
    """
    try:
        return str(scenes_folder())
    except (ModuleNotFoundError, OSError) as error:
        raise ConfigError(str(error)) from error


def find_data(args: Namespace) -> str:
    """The data folder of a training run: the one given, or digits in scenes.

    Raises:
        ConfigError: If the scenes cannot be written.
    """
    if args.data_dir:
        return args.data_dir
    _logger.info('no data folder given: training on digits in scenes')
    return embedded_scenes()


def annotated_split(args: Namespace, split: str) -> str:
    """The name of a split whose annotations are there, in any case, with or without a year: val may be val2017.

    Raises:
        ConfigError: If there is none, or several.
    """
    annotations = Path(args.data_dir, 'annotations')
    found = sorted(path.stem.removeprefix('instances_') for path in annotations.glob('instances_*.json'))
    without_year = defaultdict(list)
    for name in found:
        without_year[name.rstrip('0123456789')].append(name)
    alike = without_year.get(find_name(split.rstrip('0123456789'), without_year), [])
    if split in found or len(alike) == 1:
        return split if split in found else alike[0]
    raise ConfigError(
        f"no annotation file '{annotations / f'instances_{split}.json'}': expected DIR/SPLIT and "
        'DIR/annotations/instances_SPLIT.json'
        + (f'; there are the splits {", ".join(found)}: name them with --train-split, --val-split' if found else '')
    )


def open_split(args: Namespace, split: str, is_training: bool = False) -> CocoDetection:
    """One split of the data: DIR/SPLIT and DIR/annotations/instances_SPLIT.json.

    Raises:
        ConfigError: If it cannot be opened.
    """
    folder, name = Path(args.data_dir), annotated_split(args, split)
    annotations = folder / 'annotations' / f'instances_{name}.json'
    transform = create_transform(is_training, args.hflip if is_training else 0.0)
    try:
        return CocoDetection(folder / name, annotations, is_training, transform)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def open_splits(args: Namespace) -> Tuple[CocoDetection, CocoDetection]:
    """The training and the validation split.

    Raises:
        ConfigError: If one cannot be opened, or their categories differ.
    """
    train_set, val_set = open_split(args, args.train_split, is_training=True), open_split(args, args.val_split)
    if train_set.category_ids != val_set.category_ids:
        differing = set(train_set.category_ids) ^ set(val_set.category_ids)
        raise ConfigError(f"the splits of '{args.data_dir}' differ in the categories {sorted(differing)[:5]}")
    return train_set, val_set


class _Checked(Dataset):
    """Data set that reports unreadable images and takes the next; in validation it raises UnreadableError."""

    def __init__(self, dataset: CocoDetection, is_training: bool):
        self.dataset = dataset
        self.unreadable = torch.multiprocessing.Queue() if is_training else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Tensor, Dict[str, Any]]:
        if self.unreadable is not None:
            return read_or_next(self.dataset.__getitem__, index, len(self), self.dataset.filename, self.unreadable)
        try:
            return self.dataset[index]
        except Exception as error:  # a damaged file can make Pillow raise anything
            raise UnreadableError(f'{self.dataset.filename(index)}: {error}') from error


def _collate(samples: List[Tuple[Tensor, Dict[str, Any]]]) -> Batch:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _to(batch: Batch, device: torch.device) -> Batch:
    images, targets = batch
    return [image.to(device, non_blocking=True) for image in images], [
        {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in target.items()}
        for target in targets
    ]


class DetectionLoader:
    """The training batches, on the run's device, from any step of any epoch on.

    Args:
        args: The run's arguments.
        dataset: The training split.
        world: The processes that share the samples.

    Raises:
        ConfigError: If the batch is larger than the data set.
    """

    def __init__(self, args: Namespace, dataset: CocoDetection, world: World):
        self.dataset = dataset
        self.device = world.device
        self.num_images = len(dataset)
        checked = _Checked(dataset, is_training=True)
        self.unreadable = UnreadableImages(checked.unreadable, self.num_images, args.train_split)
        sampler = DistributedSampler(dataset, world.size, world.rank, seed=args.seed)
        self.batches = ResumableLoader(args, checked, sampler, _collate, world)
        if not len(self.batches):
            raise ConfigError(
                f'a batch of {args.batch_size} is larger than the training set of {self.num_images} images'
                f'{f" for each of {world.size} processes" if world.size > 1 else ""}: lower --batch-size'
            )

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self.batches)

    def prepare(self, epoch: int) -> None:
        """Let the workers start to load an epoch in the background."""
        self.batches.prepare(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Images (3, H, W) from 0 to 1 and targets, as torchvision's detectors take them."""
        if start >= len(self):
            return
        self.batches.seek(epoch, start)
        for batch in self.batches:
            yield _to(batch, self.device)

    def files(self, epoch: int, step: int) -> List[str]:
        """The files of a batch."""
        return [self.dataset.filename(index) for index in self.batches.indices(epoch, step)]


class ValidationLoader:
    """Each image once over all processes, in batches of one, so that its padding does not depend on other images.

    Args:
        args: The arguments.
        dataset: The validation split.
        world: The processes that share the images.
        category_ids: The detector's category id of each label, from label 1 on; those of the data if None.
    """

    def __init__(self, args: Namespace, dataset: CocoDetection, world: World, category_ids: Optional[List[int]] = None):
        self.dataset = dataset
        self.category_ids = category_ids or dataset.category_ids
        self.device = world.device
        self.unreadable = UnreadableImages(None, len(dataset), args.val_split)
        share = Subset(_Checked(dataset, is_training=False), range(world.rank, len(dataset), world.size))
        workers = dict(persistent_workers=args.workers > 0, **loader_kwargs(args, world))
        self.loader = DataLoader(share, batch_size=1, collate_fn=_collate, **workers)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield _to(batch, self.device)
