"""Paired measurements: calls alternate in one process, so that machine drift cancels."""

import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List, Sequence, Tuple

import torch
from torch.profiler import ProfilerActivity, profile

from .record import table

HEADER = ['', 'base, median', 'model, median', 'ratio', 'ratio by pair: median (95% interval)']


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


def ratio_text(ratios: Sequence[float]) -> str:
    middle, low, high = median_interval(ratios)
    return f'{middle:.3f} ({low:.3f} to {high:.3f})'


def seconds_text(seconds: float) -> str:
    return f'{seconds:.3f} s' if seconds >= 0.1 else f'{seconds * 1000:.2f} ms'


def time_row(name: str, samples: Sequence[Sequence[float]]) -> List[str]:
    """Table row of a model's seconds and its base's."""
    model, base = zip(*samples, strict=True)
    medians = statistics.median(base), statistics.median(model)
    ratios = [a / b for a, b in samples]
    return [name, *map(seconds_text, medians), f'{medians[1] / medians[0]:.3f}', ratio_text(ratios)]


def memory_row(name: str, sizes: Sequence[int]) -> List[str]:
    model, base = (size / 2**20 for size in sizes)
    return [name, f'{base:.0f} MiB', f'{model:.0f} MiB', f'{model / base:.3f}', '']


def render_rows(rows: List[List[str]]) -> str:
    return table(HEADER, rows)
