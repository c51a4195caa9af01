"""Random numbers by position: they depend only on the seed and the position in training.

Augmentation is seeded by (seed, epoch, place in the epoch's order); mixing, erasing and the model by (seed, epoch,
step, rank). So an interrupted run resumes from two integers, epoch and step, with the samples and random numbers of an
uninterrupted run, for any number of workers.
"""

import hashlib
import random
import struct
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from timm_depla.errors import ConfigError

from .images import read_stream

__all__ = ['Draw', 'PositionedBatches', 'SeededBatches', 'SeededStream', 'count_batches', 'seed_position']

Place = Tuple[int, int, int]  # epoch, place in the epoch's order over all processes, index into the data set


class Draw:
    """What draws at a position: an additional integer of the seed, so that no two uses share random numbers."""

    SAMPLE, MIX, ERASE, MODEL, INIT = range(5)


def seed_position(*position: int) -> None:
    """Seed Python's, NumPy's and torch's generators (every device's) from integers."""
    torch.manual_seed(_seed_host(position))


def _seed_host(position: Sequence[int]) -> int:
    """Seed the generators of data loading, but not torch's devices, which take a hundred times as long."""
    digest = hashlib.blake2b(repr(tuple(position)).encode(), digest_size=16).digest()
    python_seed, numpy_seed, torch_seed = struct.unpack('<IIQ', digest)
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    torch.default_generator.manual_seed(torch_seed)
    return torch_seed


def count_batches(images: int, batch_size: int, world_size: int = 1) -> int:
    """Whole batches of an epoch, of the images of one of `world_size` processes; ConfigError if there is none."""
    if images < batch_size:
        share = f' for each of {world_size} processes' if world_size > 1 else ''
        raise ConfigError(
            f'a batch of {batch_size} is larger than the training set of {images} images{share}: lower --batch-size'
        )
    return images // batch_size


class PositionedBatches(Sampler[List[Place]]):
    """Sampler of an epoch's batches from any step on; an incomplete last batch is dropped.

    Args:
        sampler: Draws an epoch's indices for this process, after `set_epoch(epoch)`: torch's `DistributedSampler` or
            timm's `RepeatAugSampler`.
        batch_size: Images per batch in this process.
        rank: Rank of this process.
        world_size: Number of processes; they take the epoch's samples in turn.

    Raises:
        ConfigError: If there is no whole batch.
    """

    def __init__(self, sampler: Any, batch_size: int, rank: int = 0, world_size: int = 1):
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.position = (0, 0)
        self.num_batches = count_batches(len(sampler), batch_size, world_size)

    def set_position(self, epoch: int, step: int) -> None:
        """Begin the next iteration at this step of this epoch."""
        self.position = (epoch, step)

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[List[Place]]:
        epoch, start = self.position
        self.sampler.set_epoch(epoch)
        indices = list(self.sampler)
        for first in range(start * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield [(epoch, i * self.world_size + self.rank, indices[i]) for i in range(first, first + self.batch_size)]


class SeededBatches(Dataset):
    """Loads and collates the batches of `PositionedBatches` from a map-style data set; each sample has its own seed."""

    def __init__(self, dataset: Any, collate: Callable, seed: int):
        self.dataset = dataset
        self.collate = collate
        self.seed = seed

    def __getitems__(self, places: Sequence[Place]) -> Tuple[torch.Tensor, torch.Tensor]:
        samples = []
        for epoch, place, index in places:
            _seed_host((self.seed, epoch, place, Draw.SAMPLE))
            samples.append(self.dataset[index])
        return self.collate(samples)


@dataclass(eq=False)
class SeededStream(IterableDataset):
    """One epoch of a streaming data set; each sample has its own seed, and samples before step `start` are empty.

    The reader's order must depend only on its seed and epoch. Samples before `start` are read again, but neither
    transformed nor collated.

    Args:
        dataset: timm's iterable data set, with its epoch and its transform set.
        to_batch: Collates a list of samples into (images, targets).
        position: Seed, epoch, rank.
        batch_size: Images per batch; each worker fills whole batches.
        channels: Channels of an image.
        start: The first step to load.
        unreadable: Queue that takes (number, cause) of each sample that cannot be read.
    """

    dataset: Any
    to_batch: Callable
    position: Tuple[int, int, int]
    batch_size: int
    channels: int
    start: int
    unreadable: Any

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        seed, epoch, rank = self.position
        for i, (image, target) in enumerate(read_stream(self.dataset.reader, self.unreadable)):
            if i // self.batch_size * num_workers + worker < self.start:  # workers take the steps in turn
                yield None
                continue
            _seed_host((seed, epoch, i, Draw.SAMPLE, rank, worker))
            yield self.dataset.transform(image), target

    def collate(self, samples: List[Any]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Collate function of the loader: returns a batch, or an empty one for a step before `start`."""
        if samples[0] is None:
            return torch.empty(0, self.channels, 1, 1, dtype=torch.uint8), torch.empty(0)
        return self.to_batch(samples)
