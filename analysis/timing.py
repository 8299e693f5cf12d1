"""Seconds and bytes of a call, shared by the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def timed(way: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one call: wall time, or what `clock` counts (on a CPU alone)."""
    if device == "cuda":
        clock = time.perf_counter
        torch.cuda.synchronize()
    begun = clock()
    way()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def peak_bytes(way: Callable[[], object], device: str) -> float:
    """Return the most bytes of tensors alive at once during one call, beyond those alive before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return float(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return float(peak)
