"""How much memory there is: of a GPU, of the machine, of a container."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Where a system does not say how much memory there is.
_UNKNOWN_MEMORY = 1 << 32


def is_gpu(device: torch.device) -> bool:
    """Whether there is a GPU to ask: fake CUDA tensors need none."""
    return device.type == "cuda" and torch.cuda.is_available()


def constant_in_graphs(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result, whose only other effect is that it imports
    torch._dynamo: three times what the rest of the package takes together with torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now, what torch has cached included; of the
    machine's memory, or the container's, where ``device`` is none of its GPUs.
    """
    if is_gpu(device):
        return _free_cuda_memory(device)
    return min(_free_host_memory(), _free_of_group())


def _free_host_memory() -> int:
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError):  # Windows has no sysconf
        return _UNKNOWN_MEMORY


# Of control groups, version 2 and 1: what a container, which sees its own here, may take and takes.
_GROUPS = {
    Path("/sys/fs/cgroup"): ("memory.max", "memory.current"),
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def _free_of_group() -> int:
    """What a container's limit leaves, pages of files counted as free, as in MemAvailable; without
    a limit more than any machine has.
    """
    for folder, names in _GROUPS.items():
        try:
            limit, usage = (int((folder / name).read_text()) for name in names)
            stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not there; or "max"
            continue
        total = "total_" if "total_active_file" in stats else ""  # in version 1 of those below, too
        files = sum(int(stats[f"{total}{kind}_file"]) for kind in ("active", "inactive"))
        return max(0, limit - usage + files)
    return 1 << 62


_last_free: dict[torch.device, int] = {}


def _free_cuda_memory(device: torch.device) -> int:
    """A capture, which is not the time to ask the driver, takes what the steps before it found: so
    it goes the way that they went.
    """
    if torch.cuda.is_current_stream_capturing():
        half = torch.cuda.get_device_properties(device).total_memory // 2
        return _last_free.get(device, half)
    free, total = torch.cuda.mem_get_info(device)
    try:
        # Once: memory_reserved and memory_allocated would each flatten and sort all of this.
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        reserved, allocated = (
            stats[f"{kind}_bytes"]["all"]["current"] for kind in ("reserved", "allocated")
        )
        free += reserved - allocated
        index = torch.cuda.current_device() if device.index is None else device.index
        allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
        free = max(reserved - allocated, min(free, allowed - allocated))
    except RuntimeError:  # an allocator that is not torch's keeps no such books
        pass
    _last_free[device] = free
    return free
