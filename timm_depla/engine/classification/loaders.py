"""Loaders of classification: timm's transforms, mixing and prefetcher, in an order that can be resumed."""

import dataclasses
from argparse import Namespace
from itertools import islice
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from PIL import Image
from timm.data import AugMixDataset, IterableImageDataset, Mixup, create_transform, resolve_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, DistributedSampler, Subset, default_collate
from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip, ToPILImage

from timm_depla.data import (
    CheckedImages,
    CheckedStream,
    Draw,
    SeededStream,
    TensorResizedCrop,
    count_batches,
    read_pixels,
    seed_position,
)
from timm_depla.errors import ConfigError, closest, require
from timm_depla.files import open_image

from ..batches import ResumableLoader, UnreadableImages, loader_kwargs
from ..distributed import World
from .datasets import image_mode, open_split


def mixes(args: Namespace) -> bool:
    """Whether training mixes images, by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def resolve_data(args: Namespace, model: Optional[nn.Module] = None, use_test_size: bool = False) -> Dict[str, Any]:
    """timm's data configuration: the model's, as the arguments change it; ConfigError if mean or std does not fit."""
    try:
        config = resolve_data_config(vars(args), model=model, use_test_size=use_test_size)
    except AssertionError as error:
        raise ConfigError('--mean and --std each take one value, or one for each channel') from error
    channels = args.in_chans or config['input_size'][0]
    config['input_size'] = (channels, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != channels:  # of weights for colour images, as timm's loader adapts them
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def check_channels(args: Namespace, data_config: Dict[str, Any]) -> None:
    """Raise a ConfigError if the image mode has other channels than the model takes."""
    channels = data_config['input_size'][0]
    if args.dataset.lower().startswith('torch/'):
        return
    mode = image_mode(args)
    bands = len(Image.new(mode, (1, 1)).getbands())
    if bands != channels:
        raise ConfigError(
            f'the model takes {channels} channels, images of the mode {mode} have {bands}: give --in-chans {bands} or '
            'another --input-img-mode'
        )
    if bands not in (1, 3) and getattr(args, 'aa', None):
        raise ConfigError(f"--aa '{args.aa}' takes grey and colour images, not those of {bands} channels: give --aa ''")


POLICIES = ('original', 'originalr', 'v0', 'v0r', '3a', 'rand', 'augmix')  # of timm, before the first dash


def _train_transform(args: Namespace, data_config: Dict[str, Any]) -> Any:
    if args.aa and (policy := args.aa.partition('-')[0]) not in POLICIES:
        hint = closest(policy, POLICIES)
        raise ConfigError(f"no augmentation policy '{args.aa}'{hint}: give one of {', '.join(POLICIES)} (--aa)")
    kwargs = {key: data_config[key] for key in ('mean', 'std')}
    interpolation = data_config['interpolation'] if args.no_aug else args.train_interpolation
    kwargs['interpolation'] = interpolation or data_config['interpolation']
    names = ['no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob']
    kwargs.update({name: getattr(args, name) for name in (*names, 'grayscale_prob', 'gaussian_blur_prob')})
    kwargs.update(auto_augment=args.aa, separate=args.aug_splits > 0)
    try:
        transform = create_transform(data_config['input_size'], is_training=True, use_prefetcher=True, **kwargs)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f'timm cannot augment as asked: {error!r}') from error
    if args.resize_backend == 'torch':
        require('torchcodec', 'fast')
        steps = (transform[0] if args.aug_splits else transform).transforms
        try:
            steps[0] = TensorResizedCrop(steps[0])
        except ValueError as error:
            raise ConfigError(f'{error}: leave out --resize-backend torch') from error
        flips = sum(isinstance(step, (RandomHorizontalFlip, RandomVerticalFlip)) for step in steps)
        if args.aug_splits or flips + 2 < len(steps):  # more than the crop and the conversion to a tensor
            steps.insert(1 + flips, ToPILImage())  # Pillow is faster at the rest
    return transform


def _stack(samples: List[Tuple[torch.Tensor, int]]) -> List[torch.Tensor]:
    """Collate images (C, H, W) in the memory order that they are decoded to, channels last, into shared memory."""
    rows, targets = default_collate([(image.permute(1, 2, 0), target) for image, target in samples])
    return [rows.permute(0, 3, 1, 2), targets]


def _mixup(args: Namespace) -> Optional[Mixup]:
    """timm's mixup and cutmix on the device, None if the arguments do not mix."""
    if not mixes(args):
        return None
    if args.batch_size % 2:
        raise ConfigError(f'mixing takes an even batch, not {args.batch_size}: change --batch-size')
    if args.aug_splits:
        raise ConfigError('--aug-splits does not go with mixup and cutmix: drop one of them')
    if args.cutmix_minmax and not (args.cutmix_minmax[0] + 0.05 <= args.cutmix_minmax[1]):
        low, high = args.cutmix_minmax
        raise ConfigError(f'--cutmix-minmax {low} {high}: the second must be larger, by 0.05 or more')
    probabilities = args.mixup_prob, args.mixup_switch_prob
    options = dict(label_smoothing=args.smoothing, num_classes=args.num_classes)
    return Mixup(args.mixup, args.cutmix, args.cutmix_minmax, *probabilities, args.mixup_mode, **options)


def _prefetch(loader: Any, data_config: Dict[str, Any], device: torch.device) -> PrefetchLoader:
    mean, std, channels = data_config['mean'], data_config['std'], data_config['input_size'][0]
    return PrefetchLoader(loader, mean, std, channels=channels, device=device)


class TrainLoader:
    """The training batches of a map-style data set or a stream of timm, on the run's device, from any step on.

    Its attribute `unreadable` collects the images that cannot be read. ConfigError if the batch size does not fit the
    data or the mixing, or timm does not know an augmentation.
    """

    def __init__(self, args: Namespace, dataset: Any, data_config: Dict[str, Any], world: World):
        self.args = args
        self.data_config = data_config
        self.world = world
        check_channels(args, data_config)
        self.transform = _train_transform(args, data_config)
        self.collate = fast_collate if args.aug_splits else _stack
        self.mixup = _mixup(args)
        self.is_stream = isinstance(dataset, IterableImageDataset)
        self.num_images = len(dataset)
        if self.is_stream:
            if args.aug_repeats or args.aug_splits:
                raise ConfigError('--aug-repeats and --aug-splits need a data set with random access, not a stream')
            self.dataset, names = dataset, torch.multiprocessing.Queue()
            self.dataset.set_loader_cfg(num_workers=max(args.workers, 1))
            self._steps = count_batches(len(self.dataset), args.batch_size)
        else:
            decode = read_pixels if args.resize_backend == 'torch' else open_image
            self.dataset = CheckedImages(dataset, True, decode) if hasattr(dataset, 'reader') else dataset
            names = getattr(self.dataset, 'unreadable', None)
            self.ahead = self._open_map()
            self.loader = _prefetch(self.ahead, data_config, world.device)
            self._steps = len(self.ahead)
        self.unreadable = UnreadableImages(names, self.num_images, args.train_split)
        self.erasing = None
        if args.reprob > 0 and not args.no_aug:
            splits = (args.aug_splits or 2) if args.resplit else 0
            kwargs = dict(mode=args.remode, max_count=args.recount, num_splits=splits, device=world.device)
            self.erasing = RandomErasing(args.reprob, **kwargs)

    def __len__(self) -> int:
        """Steps per epoch."""
        return self._steps

    def _open_map(self) -> ResumableLoader:
        """Open a data set with random access, for all epochs."""
        args, replicas = self.args, dict(num_replicas=self.world.size, rank=self.world.rank)
        if args.aug_repeats:
            replicas['selected_round'] = 256 if len(self.dataset) >= 256 else 0
            sampler = RepeatAugSampler(self.dataset, num_repeats=args.aug_repeats, **replicas)
        else:
            sampler = DistributedSampler(self.dataset, seed=args.seed, **replicas)
        self.dataset.transform = self.transform
        augmented = AugMixDataset(self.dataset, args.aug_splits) if args.aug_splits > 1 else self.dataset
        return ResumableLoader(args, augmented, sampler, self.collate, self.world)

    def _open_stream(self, epoch: int, start: int) -> Iterator[Any]:
        """Open a new stream for the epoch, seeded by the epoch, since a reader's shuffling keeps state."""
        args, world = self.args, self.world
        dataset = open_split(args, args.train_split, is_training=True, epoch=epoch)
        dataset.transform = self.transform
        dataset.set_loader_cfg(num_workers=max(args.workers, 1))
        dataset.set_epoch(epoch)
        position, channels = (args.seed, epoch, world.rank), self.data_config['input_size'][0]
        stream = SeededStream(dataset, self.collate, position, args.batch_size, channels, start, self.unreadable.names)
        options = dict(generator=torch.Generator().manual_seed(args.seed + epoch), **loader_kwargs(args, world))
        loader = DataLoader(stream, args.batch_size, drop_last=True, collate_fn=stream.collate, **options)
        return islice(_prefetch(loader, self.data_config, world.device), start, self._steps)

    def prepare(self, epoch: int) -> None:
        """Let the workers start to load an epoch in the background."""
        if not self.is_stream:
            self.ahead.prepare(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Images (B, C, H, W), normalised, and targets (B,), or (B, classes) where they are mixed."""
        if start >= len(self):
            return
        if self.is_stream:
            loaded = self._open_stream(epoch, start)
        else:
            self.ahead.seek(epoch, start)
            loaded = iter(self.loader)
        memory_format = torch.channels_last if self.args.channels_last else torch.contiguous_format
        for step, (images, targets) in enumerate(loaded, start):
            if self.mixup is not None:
                seed_position(self.args.seed, epoch, step, Draw.MIX, self.world.rank)
                self.mixup.mixup_enabled = not self.args.mixup_off_epoch or epoch < self.args.mixup_off_epoch
                images, targets = self.mixup(images, targets)
            if self.erasing is not None:
                seed_position(self.args.seed, epoch, step, Draw.ERASE, self.world.rank)
                images = self.erasing(images)
            yield images.contiguous(memory_format=memory_format), targets

    def files(self, epoch: int, step: int) -> List[str]:
        """The files of a batch; empty if the data set does not know them."""
        if self.is_stream or not hasattr(self.dataset, 'filename'):
            return []
        return [str(self.dataset.filename(index)) for index in self.ahead.indices(epoch, step)]


def create_val_loader(args: Namespace, dataset: Any, data_config: Dict[str, Any], world: World) -> PrefetchLoader:
    """Create the validation loader of train.py and validate.py: each image once over all processes.

    Its attribute `unreadable` collects those that cannot be read. ConfigError if timm cannot prepare them as asked.
    """
    check_channels(args, data_config)
    kwargs = {key: data_config[key] for key in ('interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')}
    try:
        transform = create_transform(data_config['input_size'], use_prefetcher=True, **kwargs)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f'timm cannot prepare the images as asked: {error!r}') from error
    batch_size, options = getattr(args, 'validation_batch_size', None) or args.batch_size, loader_kwargs(args, world)
    if isinstance(dataset, IterableImageDataset):
        reader = dataset.reader
        reader.dist_rank, reader.dist_num_replicas = world.rank, world.size
        if args.dataset.lower().startswith('wds/'):  # timm's split repeats and misses samples: split by shard instead
            shards = tuple(reader.split_info.filenames)[world.rank :: world.size]
            reader.split_info = dataclasses.replace(reader.split_info, filenames=shards)
            reader.dist_rank, reader.dist_num_replicas = 0, 1
        dataset.set_loader_cfg(num_workers=max(args.workers, 1))
        dataset.transform = transform
        share = dataset = CheckedStream(dataset)
    else:
        dataset = CheckedImages(dataset, False) if hasattr(dataset, 'reader') else dataset
        dataset.transform = transform
        share = Subset(dataset, range(world.rank, len(dataset), world.size))
        options['persistent_workers'] = args.workers > 0
    loader = _prefetch(DataLoader(share, batch_size, collate_fn=default_collate, **options), data_config, world.device)
    loader.unreadable = UnreadableImages(getattr(dataset, 'unreadable', None), len(dataset), args.val_split)
    return loader
