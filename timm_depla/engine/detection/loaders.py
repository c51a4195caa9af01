"""COCO-format data for training and validating detectors, in an order that can be resumed."""

from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from timm_depla.data import UnreadableError, find_annotations, read_or_next
from timm_depla.detection.coco import CocoDetection, create_transform
from timm_depla.errors import ConfigError, as_config_error

from ..batches import ResumableLoader, UnreadableImages, loader_kwargs
from ..distributed import World

Batch = Tuple[List[Tensor], List[Dict[str, Any]]]  # images (3, H, W), targets of CocoDetection


def open_split(args: Namespace, split: str, is_training: bool = False) -> CocoDetection:
    """One split of the data: DIR/SPLIT and DIR/annotations/instances_SPLIT.json; ConfigError if it does not open."""
    name, annotations = find_annotations(args.data_dir, split)
    transform = create_transform(is_training, args.hflip if is_training else 0.0)
    with as_config_error():
        return CocoDetection(Path(args.data_dir, name), annotations, is_training, transform)


def open_splits(args: Namespace) -> Tuple[CocoDetection, CocoDetection]:
    """The training and the validation split; ConfigError if one does not open, or their categories differ."""
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


class DetectionLoader(ResumableLoader):
    """The training batches, on the run's device, from any step on; ConfigError if one is larger than the data set."""

    def __init__(self, args: Namespace, dataset: CocoDetection, world: World):
        checked = _Checked(dataset, is_training=True)
        sampler = DistributedSampler(dataset, world.size, world.rank, seed=args.seed)
        super().__init__(args, checked, sampler, _collate, world)
        self.dataset = dataset
        self.device = world.device
        self.num_images = len(dataset)
        self.unreadable = UnreadableImages(checked.unreadable, self.num_images, args.train_split)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Images (3, H, W) from 0 to 1 and targets, as torchvision's detectors take them."""
        if start < len(self):
            self.seek(epoch, start)
            yield from (_to(batch, self.device) for batch in self)

    def files(self, epoch: int, step: int) -> List[str]:
        """The files of a batch."""
        return [self.dataset.filename(index) for index in self.indices(epoch, step)]


class ValidationLoader:
    """Each image once over all processes, in batches of one, so that its padding does not depend on other images.

    `category_ids` are those of the detector's labels, from label 1 on, by default those of the data.
    """

    def __init__(self, args: Namespace, dataset: CocoDetection, world: World, category_ids: Optional[List[int]] = None):
        self.dataset = dataset
        self.category_ids = category_ids or dataset.category_ids
        self.device = world.device
        self.unreadable = UnreadableImages(None, len(dataset), args.val_split)
        share = Subset(_Checked(dataset, is_training=False), range(world.rank, len(dataset), world.size))
        options = dict(persistent_workers=args.workers > 0, **loader_kwargs(args, world))
        self.loader = DataLoader(share, batch_size=1, collate_fn=_collate, **options)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield _to(batch, self.device)
