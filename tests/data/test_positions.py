"""Random numbers depend on the position alone."""

import random

import numpy as np
import torch
from helpers import equal
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from timm_depla.data import PositionedBatches, SeededBatches, seed_position


class Noise(Dataset):
    """Samples drawn from all three generators."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        pixels = np.random.randint(0, 200, (3, 4, 4)) + random.randint(0, 20) + torch.randint(0, 20, ()).item()
        return pixels.astype(np.uint8), index % 10


def load(num_workers=0, epoch=0, step=0, seed=3):
    sampler = DistributedSampler(Noise(), 1, 0, seed=seed)
    batches = PositionedBatches(sampler, 4)
    batches.set_position(epoch, step)
    dataset = SeededBatches(Noise(), default_collate, seed)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=lambda batch: batch, num_workers=num_workers)
    return list(loader)


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seed_position():
    seed_position(1, 2, 3)
    first = draws()
    seed_position(1, 2, 4)
    assert all(a != b for a, b in zip(first, draws(), strict=True))
    seed_position(1, 2, 3)
    assert draws() == first


def test_batches_depend_on_position_and_seed_alone():
    whole = load()
    assert len(whole) == 12  # of 50 samples, whole batches only
    assert equal(load(num_workers=1), whole) and equal(load(num_workers=3), whole)
    assert all(equal(load(step=step), whole[step:]) for step in range(13))
    assert not equal(load(epoch=1), whole) and not equal(load(seed=4), whole)


def test_repeated_samples_are_augmented_anew():
    batches = PositionedBatches(RepeatAugSampler(Noise(), 1, 0, num_repeats=3, selected_round=0), 6)
    (images, targets) = SeededBatches(Noise(), default_collate, 0).__getitems__(next(iter(batches)))
    assert targets[0] == targets[1] == targets[2]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
