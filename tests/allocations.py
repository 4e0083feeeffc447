"""What a step allocates, as torch's profiler saw it on a CPU.

benchmarks/memory.py asks the same, but to import the harness rearranges sys.path: where faults are
planted in a copy of the tree, the installed package would be tested in its place.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak(step: Callable[[], object]) -> int:
    """The most bytes that are held within a step, of what was allocated in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    held = most = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
