"""The processes that train together, and the signals that interrupt them."""

import ctypes
import logging
import multiprocessing
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Iterator, List, Optional

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from timm_depla.errors import ConfigError, TrainingError, UserError

ANSWER_SECONDS = 5.0  # for another rank that still runs
_WARNINGS = [getattr(signal, name) for name in ('SIGUSR1', 'SIGUSR2') if hasattr(signal, name)]  # of Slurm


@dataclass
class World:
    """This process and its place among the processes that train together.

    Attributes:
        device: Its device.
        rank: Its rank, 0 to size - 1; the process of rank 0 writes and reports.
        size: Number of processes.
        control: A process group for small objects, on CPUs; None for a single process.
        busy: Flag shared with the data loading workers: set while this process handles signals.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None
    busy: Any = field(default_factory=lambda: multiprocessing.RawValue('b', 0))

    @property
    def is_primary(self) -> bool:
        return self.rank == 0

    def all_reduce(self, *values: float, op: str = 'SUM') -> List[float]:
        """Each value's sum, or maximum by 'MAX', over all processes, in double precision."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op), group=self.control)
        return tensor.tolist()

    def gather(self, value: Any) -> Optional[List[Any]]:
        """All processes' values by rank, in the primary process; None in the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_primary else None
        dist.gather_object(value, values, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """The primary process's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def find_lost(self) -> List[int]:
        """The ranks whose connection is broken. All remaining ranks must call this.

        torchelastic's error files would not tell: a rank that is killed writes none, and Slurm alone has none.
        """
        lost, sent = [], {}
        for peer in set(range(self.size)) - {self.rank}:
            try:
                sent[peer] = [call(torch.zeros(1), peer, group=self.control) for call in (dist.isend, dist.irecv)]
            except RuntimeError:
                lost.append(peer)
        deadline = time.monotonic() + ANSWER_SECONDS
        for peer, messages in sent.items():
            start = time.monotonic()
            seconds = max(deadline - start, 0.1)
            try:
                for message in messages:
                    message.wait(timedelta(seconds=seconds))
            except RuntimeError:
                if time.monotonic() - start < seconds:  # else it is late, not lost
                    lost.append(peer)
        return sorted(lost)


@contextmanager
def explain_lost_peers(world: World) -> Iterator[None]:
    """Raise a TrainingError that names the lost process if communication fails."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or isinstance(error, UserError) or not (lost := world.find_lost()):
            raise
        raise TrainingError(
            f'lost the connection to rank {", ".join(map(str, lost))}, which was killed or failed: see its log, and '
            'start all processes again (a training with --resume auto)'
        ) from error


def keep_memory() -> None:
    """Make glibc keep freed memory, as the variables of docs/training.md do; other C libraries are left alone."""
    if os.name == 'posix' and (mallopt := getattr(ctypes.CDLL(None), 'mallopt', None)):
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def setup_world(device: str) -> World:
    """Join the processes that torchrun or Slurm started together, if any, and set up this one's device and log.

    On a CPU, freed memory is kept: else the system clears its pages again at each step.
    """
    try:
        torch.zeros((), device=device).item()  # fails on the meta device
        found = init_distributed_device_so(device)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot use device '{device}': {str(error).splitlines()[0]}") from error
    control = dist.new_group(backend='gloo') if found['distributed'] else None
    world = World(torch.device(found['device']), found['global_rank'], found['world_size'], control)
    if world.device.type == 'cpu':
        keep_memory()
    if not world.is_primary:
        logging.getLogger().setLevel(logging.WARNING)
    return world


class Interrupted(Exception):
    """A signal ends training; the process exits with 128 + `signal`, as shells do."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Interrupt:
    """Remembers a signal, so that training can end after a step; a second SIGINT ends the process at once.

    The signals are SIGTERM, SIGINT, and SIGUSR1 and SIGUSR2, which Slurm sends before a time limit. The data loading
    workers leave them to this process. `signal` is the received one, 0 for none.
    """

    def __init__(self, world: World):
        self.world = world
        self.signal = 0

    def check(self, is_due: Any = False) -> bool:
        """Whether a checkpoint is due in a process; a signal in one raises Interrupted in all. All must call this."""
        number, due = self.world.all_reduce(self.signal, bool(is_due), op='MAX')
        if number:
            raise Interrupted(int(number))
        return bool(due)

    def __enter__(self) -> 'Interrupt':
        self.world.busy.value = 1
        numbers = (signal.SIGTERM, signal.SIGINT, *_WARNINGS)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        self.world.busy.value = 0
        for number, handler in self._before.items():  # a warning of a time limit no longer matters to what has ended
            signal.signal(number, signal.SIG_IGN if number in _WARNINGS else handler)

    def _handle(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os.write(2, b'\ninterrupted again: exiting without saving\n')
            os._exit(128 + number)
        os.write(2, f'\n{signal.Signals(number).name}: finishing the step and saving\n'.encode())
        self.signal = number


def shield_worker(busy: Any, _: int) -> None:
    """Make a data loading worker ignore signals; `partial(shield_worker, world.busy)` is its `worker_init_fn`.

    Workers ignore Ctrl-C so that the main process can finish its step. SIGTERM, by which the main process ends its
    workers, ends them only while `busy` is not set.
    """

    def end(_: int, __: Any) -> None:
        if not busy.value:
            os._exit(0)  # another code would look like a failure

    for number in (signal.SIGINT, *_WARNINGS):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
