"""Times of several functions, taken in one interleaved run so that drift meets all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

Function = Callable[[], object]

SAMPLE_SECONDS = 0.01  # a sample repeats a short function until it lasts about so long
MAX_REPEATS = 2000


class Clock:
    """Seconds a call, by the host's clock: what a user waits for on a CPU."""

    def __init__(self, device: torch.device, cold: bool = False) -> None:
        self.cold = cold
        # Larger than the caches: writing it leaves nothing of the inputs there.
        self._flush = torch.empty(2**28 if cold else 0, dtype=torch.uint8, device=device)

    def seconds(self, function: Function, repeats: int) -> float:
        """Mean over `repeats` calls; with cold caches each is timed alone, after a flush."""
        if not self.cold:
            return self._span(function, repeats) / repeats
        return statistics.fmean(self._span(function, 1) for _ in range(repeats))

    def _span(self, function: Function, repeats: int) -> float:
        self._flush.zero_()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return time.perf_counter() - start


class DeviceClock(Clock):
    """The same by events on the current CUDA stream, which hold no host time but what stalls it."""

    def seconds(self, function: Function, repeats: int) -> float:
        # Untimed: the allocator may have to take memory back from the function before.
        function()
        return super().seconds(function, repeats)

    def _span(self, function: Function, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_for(device: torch.device, cold: bool = False) -> Clock:
    return (DeviceClock if device.type == "cuda" else Clock)(device, cold)


class Graphs:
    """Captures functions as CUDA graphs, which have one pool of memory: replays never overlap."""

    def __init__(self) -> None:
        self._pool = None

    def capture(self, function: Function) -> tuple[Function, Any]:
        """What replays the function, and the outputs that a replay fills. RuntimeError where it
        can't be captured.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = function()
        except RuntimeError:
            self._pool = None  # torch takes no further capture into the pool of one that failed
            torch.cuda.set_stream(stream)  # torch leaves the capture's where it cannot end one
            raise
        self._pool = graph.pool()

        def replay(function: Function = function) -> None:  # whose tensors the graph reads
            graph.replay()

        return replay, outputs


def interleaved(
    functions: dict[Hashable, Function], clock: Clock, seconds: float, rounds: int
) -> dict[Hashable, dict | Exception]:
    """Time every function for about `seconds` in all and at least `rounds` rounds.

    A round takes one sample of each. Every second round runs backwards, and every second begins
    one place further on, so that over a run all places are shared out evenly. A function
    that has had half of `seconds` for itself sits out further rounds; it has a sample at least.

    Returns:
        For each name its summary (see `summary`), or the exception that stopped it: those first, in
        the order in which they came.
    """
    failed: dict[Hashable, Exception] = {}
    samples: dict[Hashable, list[float]] = {name: [] for name in functions}
    repeats: dict[Hashable, int] = {}
    spent = dict.fromkeys(functions, 0.0)

    def sample(name: Hashable, count: int) -> float:
        start = time.perf_counter()
        try:
            return clock.seconds(functions[name], count)
        except Exception as error:  # of whatever kind: the others go on
            failed[name] = error.with_traceback(None)  # the frames hold tensors
            return math.nan
        finally:
            spent[name] += time.perf_counter() - start

    def slow(name: Hashable) -> bool:
        return bool(samples[name]) and spent[name] > seconds / 2

    for name in functions:
        sample(name, 1)
        spent[name] = 0  # whatever the first call had to set up
        once = sample(name, 1)
        repeats[name] = 1 if name in failed else calls_for(once)
        if once > seconds / 2:
            samples[name] = [once]
    begin, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begin < seconds:
        order = [name for name in functions if name not in failed and not slow(name)]
        if not order:
            break
        turn = done // 2 % len(order)
        order = order[turn:] + order[:turn]
        for name in reversed(order) if done % 2 else order:
            samples[name].append(sample(name, repeats[name]))
        done += 1
    timed = {n: summary(samples[n], repeats[n]) for n in functions if n not in failed}
    return {**failed, **timed}


def calls_for(once: float) -> int:
    """How many calls a sample takes of a function that lasts `once` seconds."""
    return min(max(math.ceil(SAMPLE_SECONDS / max(once, 1e-9)), 1), MAX_REPEATS)


def summary(samples: list[float], repeats: int) -> dict:
    """Median, 20th and 80th percentile in ms; how many samples, of how many calls each."""
    deciles = (
        statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    )
    p20, p50, p80 = (deciles[k] * 1e3 for k in (1, 4, 7))
    return {"ms": p50, "ms_20": p20, "ms_80": p80, "samples": len(samples), "repeats": repeats}
