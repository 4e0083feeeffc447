"""How much memory a step takes at its peak, above inputs and gradients; what would not fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lsoftmax.memory import free_memory

from .provider import Provider


def peak_bytes(step: Callable[[], tuple[Tensor | None, ...]], device: torch.device) -> int:
    """Largest sum of torch's allocations during one step, less the gradients it returns.

    What libraries take past torch's allocators is not seen.
    """
    return (_peak_cuda if device.type == "cuda" else _peak_cpu)(step)


def _peak_cuda(step: Callable[[], tuple[Tensor | None, ...]]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _nbytes(gradients)


def _peak_cpu(step: Callable[[], tuple[Tensor | None, ...]]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        gradients = step()
    held = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - _nbytes(gradients)


def _nbytes(tensors: tuple[Tensor | None, ...]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def too_large(provider: Provider, n: int, c: int, itemsize: int) -> str | None:
    """On a CPU: why the provider is not even tried, or None.

    There an allocation past the memory at hand succeeds, and the machine stops.
    """
    wanted = provider.arrays * n * c * max(itemsize, 4)
    free = free_memory(torch.device("cpu"))
    if wanted < 0.8 * free:
        return None
    return f"needs about {wanted / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch says so, on CUDA and on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
