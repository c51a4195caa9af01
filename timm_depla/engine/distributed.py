"""The processes that train together, and the signals that interrupt them."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Iterator, List, Optional

import torch
import torch.distributed as dist
from timm.utils import setup_default_logging
from timm.utils.distributed import init_distributed_device_so

from timm_depla.errors import ConfigError, TrainingError, UserError
from timm_depla.files import escape
from timm_depla.schema import shorten

__all__ = ['Interrupt', 'World', 'explain_lost_peers', 'keep_memory', 'run_command', 'setup_world', 'shield_worker']


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
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

    def all_reduce_max(self, value: int) -> int:
        """The highest of all processes' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def all_reduce_sum(self, *values: float) -> List[float]:
        """Each value's sum over all processes, in double precision."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
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
        """The ranks whose connection is broken. All remaining ranks must call this."""
        messages, lost = [], set()
        for peer in set(range(self.size)) - {self.rank}:
            try:
                messages.append((peer, dist.isend(torch.zeros(1), peer, group=self.control)))
                messages.append((peer, dist.irecv(torch.zeros(1), peer, group=self.control)))
            except RuntimeError:
                lost.add(peer)
        for peer, message in messages:
            try:
                message.wait(timedelta(seconds=5))
            except RuntimeError as error:
                if 'onnection' in str(error) or 'peer' in str(error):  # else it is late, not lost
                    lost.add(peer)
        return sorted(lost)


@contextmanager
def explain_lost_peers(world: World) -> Iterator[None]:
    """Context manager that names the lost process if communication fails.

    Raises:
        TrainingError: Instead of the communication error.
    """
    try:
        yield
    except RuntimeError as error:
        is_communication = any(word in str(error) for word in ('gloo', 'NCCL', 'onnection'))
        if world.size == 1 or isinstance(error, UserError) or not is_communication:
            raise
        lost = ', '.join(map(str, world.find_lost()))
        raise TrainingError(
            f'lost the connection to {f"rank {lost}" if lost else "another process"}, which was killed or failed: see '
            'its log, and start all processes again (a training with --resume auto)'
        ) from error


def setup_world(device: str) -> World:
    """Join the processes that torchrun or Slurm started together, if any, and set up this one's device and log.

    Raises:
        ConfigError: If the device is not available.
    """
    try:
        torch.zeros((), device=device).item()  # fails on the meta device
        found = init_distributed_device_so(device)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot use device '{device}': {str(error).splitlines()[0]}") from error
    control = dist.new_group(backend='gloo') if found['distributed'] else None
    world = World(torch.device(found['device']), found['global_rank'], found['world_size'], control)
    if not world.is_primary:
        logging.getLogger().setLevel(logging.WARNING)
    return world


def keep_memory() -> None:
    """Make glibc keep freed memory, which makes training on a CPU faster; other C libraries are left alone.

    Otherwise glibc requests large blocks from the system at every step, and the system has to clear their pages.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class Interrupt:
    """Remembers a signal, so that training can end after a step; a second SIGINT ends the process at once.

    The signals are SIGTERM, SIGINT, and SIGUSR1 and SIGUSR2, which Slurm sends before a time limit.

    Args:
        world: This process; its data loading workers leave those signals to it.

    Attributes:
        signal: The received signal, 0 for none. The process then exits with 128 + signal, as shells do.
    """

    def __init__(self, world: World):
        self.world = world
        self.signal = 0

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


def _escape_names() -> None:
    """Show the control characters of names in log messages, which could fake lines or drive the terminal."""
    create = logging.getLogRecordFactory()

    def create_escaped(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = create(*args, **kwargs)
        if isinstance(record.args, tuple):
            record.args = tuple(a if isinstance(a, (int, float)) else escape(str(a)) for a in record.args)
        return record

    logging.setLogRecordFactory(create_escaped)


def run_command(name: str, main: Any) -> None:
    """Run a command's main function; exit with the message of a UserError, or with 128 + signal if interrupted."""
    setup_default_logging()
    _escape_names()
    for library in ('httpx', 'httpx2'):  # they log each request to the Hub
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        code = main()
    except KeyboardInterrupt:
        os.write(2, f'\n{name}: interrupted\n'.encode())
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
            named = f'{shorten(error.filename)}: {error.strerror}' if isinstance(error, OSError) else str(error)
            rank = os.environ.get('RANK')
            sys.exit(f'{name}{f" (rank {rank})" if rank else ""}: error: {escape(named)}')
        with tempfile.NamedTemporaryFile('w', prefix=f'{name.replace(" ", "-")}-', suffix='.log', delete=False) as file:
            traceback.print_exc(file=file)
        first = (str(error).strip().splitlines() or [''])[0]
        sys.exit(f'{name}: unexpected {type(error).__name__}: {escape(first)} (the traceback is in {file.name})')
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code or 0)
