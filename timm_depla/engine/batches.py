"""Batches of a map-style data set from any position on, loaded by persistent workers."""

from argparse import Namespace
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional

from torch.utils.data import DataLoader

from timm_depla.data import PositionedBatches, SeededBatches

from .distributed import World, shield_worker

__all__ = ['ResumableLoader', 'loader_kwargs']


def loader_kwargs(args: Namespace, world: World) -> Dict[str, Any]:
    """Keyword arguments of every `DataLoader`."""
    init = partial(shield_worker, world.busy)
    return dict(num_workers=args.workers, pin_memory=args.pin_mem, worker_init_fn=init)


class ResumableLoader:
    """Loader of an epoch's batches from the step set by `seek` on; `prepare` starts loading the next epoch early.

    Args:
        args: The run's arguments: `batch_size`, `seed`, `workers`, `pin_mem`.
        dataset: A map-style data set with its transform.
        sampler: Draws an epoch's indices; see `PositionedBatches`.
        collate: Collates a list of samples into a batch.
        world: The processes that share the samples.
    """

    def __init__(self, args: Namespace, dataset: Any, sampler: Any, collate: Callable, world: World):
        self.batches = PositionedBatches(sampler, args.batch_size, world.rank, world.size)
        self.loader = DataLoader(
            SeededBatches(dataset, collate, args.seed),
            batch_sampler=self.batches,
            collate_fn=_as_it_is,
            persistent_workers=args.workers > 0,
            **loader_kwargs(args, world),
        )
        self._started: Optional[Iterator[Any]] = None

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.batches)

    def seek(self, epoch: int, step: int) -> None:
        """Begin the next iteration at this step of this epoch."""
        if self.batches.position != (epoch, step):
            self._started = None
        self.batches.set_position(epoch, step)

    def prepare(self, epoch: int) -> None:
        """Let the workers start to load an epoch in the background."""
        self.seek(epoch, 0)
        self._started = iter(self.loader)

    def __iter__(self) -> Iterator[Any]:
        started, self._started = self._started, None
        return iter(self.loader) if started is None else started

    def indices(self, epoch: int, step: int) -> List[int]:
        """The sample indices of a batch."""
        self.batches.set_position(epoch, step)
        return [index for _, _, index in next(iter(self.batches))]


def _as_it_is(batch: Any) -> Any:
    return batch
