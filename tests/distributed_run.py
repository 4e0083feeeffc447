"""Checks that several processes make together, and what each of them found.

A check is a function of a ``World``; the processes of a world run its checks one after the other,
so that they start only once. The first failure ends a process, and with it the others.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch import multiprocessing as mp

import lsoftmax
from problems import relative_error

# Rows of each process: unequal, and the second has none.
SIZES = (5, 0, 7, 3, 4, 1, 6, 2)


@dataclass
class World:
    """What a process knows of the run that it is in."""

    rank: int
    size: int
    folder: Path  # shared, and kept from one world to the next
    seed: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return SIZES[: self.size]

    @property
    def rows(self) -> slice:
        """This process's part of a batch that ``sizes`` divides."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])


def launch(
    size: int,
    checks: Sequence[str],
    folder: Path,
    seed: int,
    timeout: float = 60,
    emulated: bool = False,
) -> list[dict[str, str]]:
    """What came of the checks ("module:function") on each process: "passed" or a traceback.

    A check that a process did not come to is missing. With ``emulated`` the kernels serve the ops.
    """
    # Torch is imported once, by the server that all processes are forked from.
    multiprocessing.set_forkserver_preload(["lsoftmax.distributed", "problems", "distributed_run"])
    number = len(list(folder.glob("store-*")))
    args = (size, list(checks), folder, number, seed, timeout, emulated)
    try:
        mp.start_processes(_run, args, nprocs=size, start_method="forkserver")
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        print(error)  # the checks' own words are in the results
    results = [folder / f"result-{number}-{rank}.json" for rank in range(size)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in results]


def _run(
    rank: int,
    size: int,
    checks: list[str],
    folder: Path,
    number: int,
    seed: int,
    timeout: float,
    emulated: bool,
) -> None:
    torch.set_num_threads(1)
    if emulated:
        from emulation import build

        build.load()
    warnings.filterwarnings("error", module="lsoftmax")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{number}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    world = World(rank, size, folder, seed)
    found: dict[str, str] = {}
    for check in checks:
        module, _, name = check.partition(":")
        torch.manual_seed(seed)
        try:
            getattr(importlib.import_module(module), name)(world)
            found[check] = "passed"
        except BaseException:
            found[check] = f"rank {rank} of {size}\n{traceback.format_exc()}"
            raise
        finally:
            part = folder / f"part-{number}-{rank}.json"  # whole or not at all: it may be killed
            part.write_text(json.dumps(found))
            part.rename(folder / f"result-{number}-{rank}.json")
    dist.barrier()
    dist.destroy_process_group()


def assert_close(value: Tensor, truth: Tensor, what: str, bound: float = 1e-10) -> None:
    error = relative_error(value.detach(), truth.detach())
    assert error <= bound, f"{what}: relative error {error:.3g}\n{value}\n{truth}"


def plain_twin(head: torch.nn.Module, **options: object) -> lsoftmax.LSoftmaxLoss:
    """The layer of one process with the same weights."""
    whole = head.linear.weight.full_tensor().detach()
    twin = lsoftmax.LSoftmaxLoss(
        head.in_features, head.num_classes, head.margin, dtype=whole.dtype, **options
    )
    with torch.no_grad():
        twin.linear.weight.copy_(whole)
    return twin


def same_everywhere(value: Tensor) -> bool:
    """Whether all processes have the same bits."""
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    return all(torch.equal(other, value) for other in values)
