"""Paired measurements: calls take turns in one process, so that machine drift cancels."""

import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List, Sequence, Tuple, Union

import torch
from scipy.stats import ttest_1samp
from torch.profiler import ProfilerActivity, profile

KEEP_MEMORY = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': '2147483647'}  # for glibc: docs/training.md
# A row of seconds for each round, or one row of bytes; a column for each call, of which the base is the last.
Samples = Union[Sequence[Sequence[float]], Sequence[int]]


def _time(call: Callable[[], Any], device: str) -> float:
    if device == 'cpu':
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def time_rounds(calls: Sequence[Callable[[], Any]], rounds: int, device: str = 'cpu') -> List[List[float]]:
    """Seconds of each call in each round, after three warm-up rounds; the order of the calls alternates."""
    samples = []
    for i in range(-3, rounds):
        seconds = {}
        for j in range(len(calls)) if i % 2 else reversed(range(len(calls))):
            seconds[j] = round(_time(calls[j], device), 6)
        samples.append([seconds[j] for j in range(len(calls))])
    return samples[3:]


def peak_memory(call: Callable[[], Any], device: str = 'cpu') -> int:
    """Peak bytes that PyTorch allocates during a call, in addition to those allocated before."""
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    memory = sorted((e for e in events if e['name'] == '[memory]'), key=lambda event: event['ts'])
    before = memory[0]['args']['Total Allocated'] - memory[0]['args']['Bytes']
    return max(event['args']['Total Allocated'] for event in memory) - before


def median_interval(values: Sequence[float]) -> Tuple[float, float, float]:
    """Median, and the ends of its 95% interval by order statistics (sign test), for any distribution of the values."""
    ordered, count = sorted(values), len(values)
    below, rank = 0.0, 0
    while rank < count // 2:  # the most values outside of each end with a tail probability of at most 2.5%
        below += math.comb(count, rank) / 2**count
        if below > 0.025:
            break
        rank += 1
    low = max(rank - 1, 0)
    return statistics.median(ordered), ordered[low], ordered[count - 1 - low]


def ratio_text(samples: Samples, column: int = 0) -> str:
    """The ratio of a column to the base's: median and 95% interval over rows of seconds, or the ratio of two sizes."""
    if not isinstance(samples[0], Sequence):
        return f'{samples[column] / samples[-1]:.3f}'
    middle, low, high = median_interval([row[column] / row[-1] for row in samples])
    return f'{middle:.3f} ({low:.3f} to {high:.3f})'


def speed_text(base: Sequence[float], seconds: Sequence[float]) -> str:
    """How many times as fast as the base: median and 95% interval over pairs of times."""
    return ratio_text(list(zip(base, seconds, strict=True)))


def mean_text(values: Sequence[float]) -> str:
    """Mean and Student's 95% interval of differences."""
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return f'{statistics.mean(values):+.2f} ({low:+.2f} to {high:+.2f})'


def seconds_text(seconds: float) -> str:
    return f'{seconds:.3f} s' if seconds >= 0.1 else f'{seconds * 1000:.2f} ms'


def median_text(samples: Samples, column: int) -> str:
    """Median of a column of seconds, or the size of a column in bytes."""
    if not isinstance(samples[0], Sequence):
        return f'{samples[column] / 2**20:.0f} MiB'
    return seconds_text(statistics.median(row[column] for row in samples))


def score_cells(scores: Sequence[float]) -> List[str]:
    """Each score in percent, and their mean."""
    return [' '.join(f'{score:.2f}' for score in scores), f'{statistics.mean(scores):.2f}']
