"""The class-parallel layer's checkpoints, and what the others see of a process that fails."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import lsoftmax
from distributed_run import World
from distributed_training_checks import C, D, batches, sgd, whole
from lsoftmax.distributed import ClassParallelLSoftmaxLoss
from problems import nearest

# ---- checkpoints -------------------------------------------------------------------------------


def schedule() -> lsoftmax.LambdaSchedule:
    return lsoftmax.LambdaSchedule(10.0, 0.5, 1.0, keep=0.5, num_classes=C)


def training_of(backbone_seed: int, plain: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A head with momentum and annealing, on any number of processes or in one alone."""
    torch.manual_seed(backbone_seed)
    kind = lsoftmax.LSoftmaxLoss if plain else ClassParallelLSoftmaxLoss
    head = kind(D, C, lam=schedule(), dtype=torch.float64)
    return head, sgd(head)


def step(head: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = head(x, y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def state_of(head: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model, optim = get_state_dict(head, optimizer)
    return {"model": model, "optim": optim}


def load(head: nn.Module, optimizer: torch.optim.Optimizer, path: Any) -> None:
    state = state_of(head, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        head, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )


def resumed(world: World) -> None:
    """Two steps, a checkpoint, two more: bit for bit the same from the checkpoint."""
    data = [(torch.randn(sum(world.sizes), D).double(), y) for _, y in batches(world, 4)]
    head, optimizer = training_of(1)
    losses = []
    path = world.folder / f"resumed-{world.size}"
    for number, (x, y) in enumerate(data):
        if number == 2:
            dcp.save(state_of(head, optimizer), checkpoint_id=path)
        losses.append(step(head, optimizer, x[world.rows], y[world.rows]))
    again, optimizer = training_of(2)
    load(again, optimizer, path)
    for number, (x, y) in enumerate(data[2:], 2):
        loss = step(again, optimizer, x[world.rows], y[world.rows])
        assert torch.equal(loss, losses[number])
    assert torch.equal(whole(again.linear.weight), whole(head.linear.weight))
    assert torch.equal(again.lam, head.lam)


def fixed_batch(rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    """A process's part of the same batch in every world."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, D, generator=generator, dtype=torch.float64)
    y = nearest(x, training_of(1, plain=True)[0])
    rows = torch.arange(12).tensor_split(size)[rank]
    return x[rows], y[rows]


def go_on(world: World) -> None:
    """Load what another world, or one process without any, has saved; take a step; save."""
    saved = sorted(world.folder.glob("checkpoint-*"))
    head, optimizer = training_of(1 + len(saved))
    if saved:
        load(head, optimizer, saved[-1])
    step(head, optimizer, *fixed_batch(world.rank, world.size))
    dcp.save(state_of(head, optimizer), checkpoint_id=world.folder / f"checkpoint-{len(saved)}")


def whole_state_dicts(world: World) -> None:
    """One file for one process, and back; the layer takes the whole W as it is."""
    head, _ = training_of(1)
    full = get_model_state_dict(head, options=StateDictOptions(full_state_dict=True))
    twin, _ = training_of(2, plain=True)
    if world.rank == 0:
        twin.load_state_dict(full)
        assert torch.equal(twin.linear.weight, full["linear.weight"])
    other, _ = training_of(4)
    twin, _ = training_of(5, plain=True)
    twin.schedule.step()
    other.load_state_dict(twin.state_dict())
    assert torch.equal(whole(other.linear.weight), twin.linear.weight)
    assert other.schedule.steps == 1


def rows_of_another(world: World) -> None:
    """torch.save has the rows of one process; red if another takes them for its own."""
    head, _ = training_of(1)
    mine, theirs = (world.folder / f"rows-{rank}.pt" for rank in (world.rank, 0))
    torch.save(head.state_dict(), mine)
    dist.barrier()
    other, _ = training_of(2)
    other.load_state_dict(torch.load(mine, weights_only=False))
    assert torch.equal(whole(other.linear.weight), whole(head.linear.weight))
    if world.rank > 0:
        message = f"process {world.rank} of {world.size}, got those of 0 of {world.size}"
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(torch.load(theirs, weights_only=False))


def shard_of_a_shard(world: World) -> None:
    """Classes over two processes each, whose rows FSDP2 shards over two more: own states load, and
    whole ones. Four processes.
    """
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
    torch.manual_seed(world.seed)
    head = ClassParallelLSoftmaxLoss(D, 8, process_group=mesh["classes"])
    before = whole(head.linear.weight)
    fully_shard(head, mesh=mesh["rows"])
    own = copy.deepcopy(head.state_dict())
    full = get_model_state_dict(head, options=StateDictOptions(full_state_dict=True))
    for state in (own, full):
        torch.nn.init.zeros_(head.linear.weight)
        options = StateDictOptions(full_state_dict=state is full)
        set_model_state_dict(head, state, options=options)
        assert torch.equal(whole(head.linear.weight), before)
    with pytest.raises(RuntimeError, match="fully_shard"):
        head.margin_stats(torch.randn(2, D), torch.tensor([0, 1]))


# ---- failures ----------------------------------------------------------------------------------


def survivor(world: World, what_happens: Any) -> None:
    """The last process fails in its second step; the others get an error, and soon."""
    head, optimizer = training_of(1)
    x, y = torch.ones(2, D, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    step(head, optimizer, x, y)
    if world.rank == world.size - 1:
        what_happens()
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        step(head, optimizer, x, y)
    assert time.monotonic() - start < 7
    (world.folder / f"survived-{world.rank}").touch()
    os._exit(0)  # there is nobody left to say goodbye to


def dies(world: World) -> None:
    survivor(world, lambda: None)


def raises(world: World) -> None:
    """As a program ends that an exception has left."""

    def fail() -> None:
        head = ClassParallelLSoftmaxLoss(D, C, max_local_batch=1)
        with pytest.raises(ValueError, match="at most max_local_batch"):
            head(torch.ones(2, D), torch.zeros(2, dtype=torch.int64))
        dist.destroy_process_group()

    survivor(world, fail)


def hangs(world: World) -> None:
    survivor(world, lambda: time.sleep(8))
