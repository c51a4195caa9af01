"""Two things measured against each other: in turn, in one process, so that a drift of the machine cancels."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List, Sequence

from torch.profiler import ProfilerActivity, profile

from .record import table

HEADER = ['', 'base, median', 'model, median', 'ratio', 'ratio by pair: median (quartiles)']


def time_pairs(model: Callable[[], Any], base: Callable[[], Any], pairs: int) -> List[List[float]]:
    """Seconds of both calls, pair by pair, after three calls of each to warm up."""
    calls = (model, base)
    for call in calls * 3:
        call()
    samples = []
    for pair in range(pairs):
        seconds = {}
        for i in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            calls[i]()
            seconds[i] = round(time.perf_counter() - start, 5)
        samples.append([seconds[0], seconds[1]])
    return samples


def peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes that PyTorch allocates on the CPU at a time during a call, beside what it has before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    memory = sorted((e for e in events if e['name'] == '[memory]'), key=lambda event: event['ts'])
    before = memory[0]['args']['Total Allocated'] - memory[0]['args']['Bytes']
    return max(event['args']['Total Allocated'] for event in memory) - before


def time_row(name: str, samples: Sequence[Sequence[float]]) -> List[str]:
    model, base = zip(*samples, strict=True)
    ratios = [a / b for a, b in samples]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = statistics.median(base), statistics.median(model)
    return [
        name, *(f'{seconds:.3f} s' for seconds in medians), f'{medians[1] / medians[0]:.3f}',
        f'{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})',
    ]  # fmt: skip


def memory_row(name: str, sizes: Sequence[int]) -> List[str]:
    model, base = (size / 2**20 for size in sizes)
    return [name, f'{base:.0f} MiB', f'{model:.0f} MiB', f'{model / base:.3f}', '']


def render_rows(rows: List[List[str]]) -> str:
    return table(HEADER, rows)
