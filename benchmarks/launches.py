"""What a step starts on a GPU: how many kernels, and which take the time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NAME_LENGTH = 120  # template arguments can fill pages


def device_work(step: Callable[[], object]) -> list[dict]:
    """Kernels, copies and fills of one step on a GPU, by the time they take.

    Each is {"name", "calls", "us"}: the calls in this step and their time together.
    """
    step()  # its first call may set something up
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        step()
        torch.cuda.synchronize()
    kernels: dict[str, dict] = {}
    for event in run.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            name = event.name()[:NAME_LENGTH]
            kernel = kernels.setdefault(name, {"name": name, "calls": 0, "us": 0.0})
            kernel["calls"] += 1
            kernel["us"] += event.duration_ns() / 1e3
    return sorted(kernels.values(), key=lambda kernel: -kernel["us"])
