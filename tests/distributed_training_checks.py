"""The class-parallel layer in training: backbones, sampling, checkpoints, failures."""

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
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import lsoftmax
from distributed_run import World, assert_close, plain_twin, same_everywhere
from lsoftmax.distributed import ClassParallelLSoftmaxLoss, clip_grad_norm_
from problems import nearest

F, D, C = 5, 6, 11


def schedule() -> lsoftmax.LambdaSchedule:
    return lsoftmax.LambdaSchedule(10.0, 0.5, 1.0)


def backbone_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(F, 8), nn.Tanh(), nn.Linear(8, D)).to(dtype)


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": list(module.parameters())} for module in modules]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def batches(world: World, steps: int) -> list[tuple[Tensor, Tensor]]:
    n = sum(world.sizes)
    return [(torch.randn(n, F, dtype=torch.float64), torch.randint(C, (n,))) for _ in range(steps)]


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def assert_same_training(
    world: World, backbone: nn.Module, twin_backbone: nn.Module, sync: Any, bound: float, **options
) -> None:
    """Four steps of two accumulated batches, clipped, beside one process with all the rows."""
    head = ClassParallelLSoftmaxLoss(D, C, dtype=torch.float64, **options)
    twin = plain_twin(head, **copy.deepcopy(options))
    optimizer, twin_optimizer = sgd(backbone, head), sgd(twin_backbone, twin)
    for _ in range(4):
        for last, (x, _) in enumerate(batches(world, 2)):
            sync(bool(last))
            features = twin_backbone(x)
            y = nearest(features, twin)
            loss = head(backbone(x[world.rows]), y[world.rows])
            (loss / 2).backward()
            twin_loss = twin(features, y)
            (twin_loss / 2).backward()
            assert_close(loss, twin_loss, "loss", bound)
            assert same_everywhere(loss.detach())
        parameters = [*backbone.parameters(), *head.parameters()]
        twin_parameters = [*twin_backbone.parameters(), *twin.parameters()]
        norm = clip_grad_norm_(parameters, 0.05)
        again = clip_grad_norm_(parameters[0], torch.inf)  # of one alone, as torch's takes it
        assert_close(again, whole(parameters[0].grad).norm(), "norm of one")
        twin_norm = nn.utils.clip_grad_norm_(twin_parameters, 0.05)
        assert_close(norm, twin_norm, "norm", bound)
        assert twin_norm > 0.05, "nothing was clipped"
        for ours, theirs in zip(parameters, twin_parameters, strict=True):
            assert_close(whole(ours.grad), theirs.grad, "gradient", bound)
        for each in (optimizer, twin_optimizer):
            each.step()
            each.zero_grad()
    for ours, theirs in zip(parameters, twin_parameters, strict=True):
        assert_close(whole(ours), theirs, "parameter", bound)
    assert_close(head.lam, twin.lam, "lam", bound)
    assert_close(head.schedule.share, twin.schedule.share, "share", max(bound, 1e-5))
    assert twin.schedule.share > 0 or twin.schedule.keep is None
    assert same_everywhere(head.lam)
    assert head.schedule.steps == 8


def data_parallel(world: World) -> None:
    """Red for a lost factor R, and for annealing that is not in lockstep. The angle that the
    default schedule follows is that of all rows (in float32).
    """
    for lam, bound in ((schedule(), 1e-10), (lsoftmax.LambdaSchedule.by_angle(), 1e-6)):
        twin = backbone_of()
        backbone = DistributedDataParallel(copy.deepcopy(twin))

        def sync(wanted: bool, backbone: nn.Module = backbone) -> None:
            backbone.require_backward_grad_sync = wanted  # what no_sync() sets

        assert_same_training(world, backbone, twin, sync, bound, lam=lam)


def averaged(world: World) -> None:
    """A moving average of the weights, which is a copy of the layer: that of one process."""
    head = ClassParallelLSoftmaxLoss(D, C, dtype=torch.float64, lam=schedule())
    layers = head, plain_twin(head, lam=schedule())
    averages = [AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for layer in layers]
    optimizers = [sgd(layer) for layer in layers]
    n = sum(world.sizes)
    x, y = torch.randn(n, D, dtype=torch.float64), torch.randint(C, (n,))
    for _ in range(3):
        for layer, mine in zip(layers, (world.rows, slice(None)), strict=True):
            layer(x[mine], y[mine]).backward()
        for average, layer, optimizer in zip(averages, layers, optimizers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(layer)
    ours, theirs = (average.eval() for average in averages)
    assert_close(whole(ours.module.linear.weight), theirs.module.linear.weight, "average")
    assert not torch.equal(whole(ours.module.linear.weight), whole(head.linear.weight))
    assert_close(ours(x[world.rows], y[world.rows]), theirs(x, y), "loss of the average")


def fully_sharded(world: World) -> None:
    twin = backbone_of()
    backbone = fully_shard(copy.deepcopy(twin))
    sync = backbone.set_requires_gradient_sync
    assert_same_training(world, backbone, twin, sync, 1e-10, lam=schedule())


def compiled_under_autocast(world: World) -> None:
    """The head in the autocast type beside its twin in the same, behind a compiled backbone."""
    twin_backbone = backbone_of(torch.float32)
    backbone = DistributedDataParallel(
        torch.compile(copy.deepcopy(twin_backbone), backend="aot_eager")
    )
    head = ClassParallelLSoftmaxLoss(D, C, lam=1.0)
    twin = plain_twin(head, lam=1.0)
    ((x, y),) = batches(world, 1)
    x = x.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(backbone(x[world.rows]), y[world.rows])
        truth = twin(twin_backbone(x), y)
    loss.backward()
    truth.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, truth, "loss", 1e-6)
    assert_close(whole(head.linear.weight.grad), twin.linear.weight.grad, "dW", 2e-2)
    for ours, theirs in zip(backbone.parameters(), twin_backbone.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, "gradient", 5e-2)
    both = torch.compile(lambda x, y: head(backbone(x), y), backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(both(x[world.rows], y[world.rows]), truth, "the head compiled too", 1e-6)


def sampled(world: World) -> None:
    """The loss over the sampled classes, by the specification; drawn anew each step, and again the
    same from a checkpoint.
    """
    many = 50 * world.size + 3
    options = {"sample_rate": 0.5, "seed": world.seed, "lam": 1.0, "dtype": torch.float64}
    head = ClassParallelLSoftmaxLoss(D, many, **options)
    mine = head.linear.classes
    n = sum(world.sizes)
    samples = []
    for _ in range(2):
        x, y = torch.randn(n, D, dtype=torch.float64), torch.randint(many, (n,))
        y[:2] = mine.stop - 1 if world.size == 1 else 2
        here = torch.where((y >= mine.start) & (y < mine.stop), y - mine.start, -1)
        chosen = head.sampling(here, len(mine), world.rank) + mine.start
        assert len(chosen) == -(-len(mine) // 2)
        assert torch.isin(y[here >= 0], chosen).all()
        of_all: list[Any] = [None] * world.size
        dist.all_gather_object(of_all, chosen)
        classes = torch.cat(of_all)
        samples.append(classes)

        w = whole(head.linear.weight).detach().requires_grad_()
        rows = x.clone().requires_grad_()
        target = torch.searchsorted(classes, y)
        truth = lsoftmax.reference.lsoftmax_loss(rows, w[classes], target, 4, 1.0)
        truth.backward()
        own = x[world.rows].clone().requires_grad_()
        head.zero_grad()
        loss = head(own, y[world.rows])
        loss.backward()
        assert_close(loss, truth, "loss")
        assert_close(own.grad / world.size, rows.grad[world.rows], "dX")
        assert_close(whole(head.linear.weight.grad), w.grad, "dW")
    assert not torch.equal(*samples)
    assert head.sampling.draws == 2

    gradients = []
    for again in (False, True):  # run twice by an activation checkpoint: the same sample
        twin = ClassParallelLSoftmaxLoss(D, many, **options)
        twin.load_state_dict(head.state_dict())
        args = own, y[world.rows]
        loss = checkpoint(twin, *args, use_reentrant=False) if again else twin(*args)
        loss.backward()
        assert twin.sampling.draws == 3
        gradients.append(whole(twin.linear.weight.grad))
    assert torch.equal(*gradients)

    other = ClassParallelLSoftmaxLoss(D, many, **options)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head(own, y[world.rows]), other(own, y[world.rows]))
    head.eval()
    twin = plain_twin(head, lam=1.0)
    assert_close(head(own, y[world.rows]), twin(x, y), "evaluation: all classes")

    few = ClassParallelLSoftmaxLoss(D, many, sample_rate=0.01, lam=1.0, dtype=torch.float64)
    first = torch.arange(n)[world.rows]  # all different, all of the first shard where it has them
    assert few(own.detach(), first).isfinite(), "there is room for every target"


# ---- checkpoints -------------------------------------------------------------------------------


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
    y = torch.randint(C, (12,), generator=generator)
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
