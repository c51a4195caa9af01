"""Batches of a map-style data set from any position on, loaded by persistent workers, and what cannot be read."""

import logging
import queue
from argparse import Namespace
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional

from torch.utils.data import DataLoader

from timm_depla.data import PositionedBatches, SeededBatches, UnreadableError
from timm_depla.errors import TrainingError

from .distributed import World, shield_worker

_logger = logging.getLogger(__name__)


def loader_kwargs(args: Namespace, world: World) -> Dict[str, Any]:
    """Keyword arguments of every `DataLoader`."""
    init = partial(shield_worker, world.busy)
    return dict(num_workers=args.workers, pin_memory=args.pin_mem, worker_init_fn=init)


class ResumableLoader:
    """Loader of an epoch's batches from the step set by `seek` on; `prepare` starts loading the next epoch early.

    The data set is a map-style one with its transform; for the sampler, see `PositionedBatches`.
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


def max_unreadable(num_images: int) -> int:
    """How many of so many images may be unreadable: 1%, but at least one."""
    return max(1, num_images // 100)


@dataclass
class UnreadableImages:
    """Names and counts the images that were skipped.

    Attributes:
        names: The queue of (file, cause), or None if the data set reports none.
        num_images: Images of the split.
        split: Its name.
    """

    names: Any
    num_images: int
    split: str
    _files: Dict[str, str] = field(default_factory=dict)

    def collect(self, wait: bool = False) -> None:
        """Log what was skipped since the last call; more of the split than `max_unreadable` is a TrainingError."""
        while self.names is not None:
            try:
                file, cause = self.names.get(timeout=0.05) if wait else self.names.get_nowait()
            except queue.Empty:
                break
            if file not in self._files:
                self._files[file] = cause
                _logger.warning('skipped an unreadable image, %d so far: %s: %s', len(self._files), file, cause)
        if len(self._files) > max_unreadable(self.num_images):
            named = '; '.join(f'{file}: {cause}' for file, cause in list(self._files.items())[:5])
            raise TrainingError(
                f"{len(self._files)} of the {self.num_images} images of the split '{self.split}' cannot be read, more "
                f'than 1%: {named}. Replace or remove them'
            )


def explained(error: Exception) -> Exception:
    """The error, or one that says in a sentence why data loading, or a norm, failed."""
    text = str(error)
    if 'more than 1 value per channel' in text:
        return TrainingError('a norm sees one value per channel in a batch: raise --batch-size or the image size')
    if not isinstance(error, UnreadableError) and 'DataLoader worker' not in text:
        return error
    lines = [line for line in text.splitlines() if line.strip()]
    cause = lines[-1] if isinstance(error, UnreadableError) or 'Traceback' in text else lines[0]
    died = 'killed' in cause or 'exited unexpectedly' in cause
    hint = 'If it was killed, memory may have run out: lower --workers' if died else 'Mend the data'
    if 'auto_augment.py' in text or 'transforms.py' in text:
        hint = 'The image was read, but its augmentation failed: choose another --aa, or leave it out'
    return TrainingError(f'loading data failed: {cause.rstrip(".")}. {hint}, and resume with --resume auto')
