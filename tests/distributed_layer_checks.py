"""The layer of one process in a data-parallel model, DDP's and FSDP2's, beside the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lsoftmax
from distributed_run import World, assert_close, plain_twin, same_everywhere
from lsoftmax.distributed import ClassParallelLSoftmaxLoss
from problems import nearest

ROWS, F, D, C = 4, 5, 6, 7  # ROWS of each process


class Model(nn.Module):
    def __init__(self, lam: lsoftmax.LambdaSchedule) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(F, D), lsoftmax.LSoftmaxLoss(D, C, margin=3, lam=lam)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.body(x).tanh(), y)


def train(model: nn.Module, batches: list, rows: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        model(x[rows], y[rows]).backward()
        optimizer.step()


def annealed(world: World) -> None:
    """Parameters and lam of the run on one process with all rows, by a curve and by the angle.

    Under DDP the angle of process 0 goes to all. FSDP2 sends no buffers: lam drifts apart unless
    they are sent by hand, as the documentation says.
    """
    n, rows = ROWS * world.size, slice(ROWS * world.rank, ROWS * (world.rank + 1))
    curve = lsoftmax.LambdaSchedule(10.0, 0.5, 1.0)
    for lam in (curve, lsoftmax.LambdaSchedule.by_angle()):
        torch.manual_seed(world.seed)
        twin = Model(lam).double()
        inputs = [torch.randn(n, F).double() for _ in range(5)]
        batches = [(x, nearest(twin.body(x).tanh(), twin.head)) for x in inputs]
        replicated, sharded = copy.deepcopy(twin), copy.deepcopy(twin)
        fully_shard(sharded.head)
        fully_shard(sharded)
        train(twin, batches, slice(None))
        train(DistributedDataParallel(replicated), batches, rows)
        train(sharded, batches, rows)
        for model in (replicated, sharded):
            assert model.head.schedule.steps == 5
            assert model.head.schedule.share > 0 or lam is curve
            if lam is not curve:
                continue
            assert_close(model.head.lam, twin.head.lam, "lam")
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
                assert_close(whole, theirs, "parameter")
        assert same_everywhere(replicated.head.lam)
        for buffer in sharded.head.schedule.buffers():
            dist.broadcast(buffer, 0)
        upcoming = sharded.head.schedule.upcoming()
        assert same_everywhere(upcoming)


def stats(world: World) -> None:
    """Of all batches and all classes, one class lost, one row zero, one ignored; and of no row."""
    for classes in (C, world.size * 3, 1):
        torch.manual_seed(world.seed)
        head = ClassParallelLSoftmaxLoss(D, classes, margin=3, lam=0.7)
        w = torch.randn(classes, D)
        w[-1] = 0 if classes > 1 else w[-1]
        head.load_state_dict({"linear.weight": w})
        sizes = [ROWS + rank for rank in range(world.size - 1)] + [0 if world.size > 1 else ROWS]
        x, y = torch.randn(sum(sizes), D), torch.randint(classes, (sum(sizes),))
        x[1] = 0
        y[2] = -100
        start = sum(sizes[: world.rank])
        rows = slice(start, start + sizes[world.rank])
        kept = y >= 0
        expected = lsoftmax.margin_stats(x[kept], w, y[kept], 3, 0.7)
        for name, value in head.margin_stats(x[rows], y[rows])._asdict().items():
            truth = getattr(expected, name).double()  # NaN where all rows are of the lost class
            torch.testing.assert_close(
                value.double(), truth, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name
            )
        with pytest.raises(ValueError, match="at least one row"):
            head.margin_stats(x[:1], torch.tensor([-100]))
    with pytest.raises(TypeError, match=r"got a DTensor: .* margin_stats\(input, target\)"):
        lsoftmax.margin_stats(x, head.linear.weight, y)


def counted_classes(world: World) -> None:
    """Every process counts all rows, as one process with all of them does: in chunks of classes,
    with a sample of the classes, and a process without rows. Red if a row counts on one process
    alone or ignored rows do.
    """
    many = 10 * world.size + 1
    for options in ({}, {"memory_budget": 1}, {"sample_rate": 0.5}):
        schedules = [lsoftmax.LambdaSchedule.by_angle(num_classes=many) for _ in range(2)]
        head = ClassParallelLSoftmaxLoss(D, many, 3, lam=schedules[0], **options)
        twin = plain_twin(head, lam=schedules[1])
        for _ in range(3):
            n = sum(world.sizes)
            y = torch.where(torch.rand(n) < 0.5, 0, torch.randint(many, (n,)))
            x = twin.linear.weight.detach()[y] + 0.1 * torch.randn(n, D)
            y[0], x[0] = -100, torch.nan
            head(x[world.rows], y[world.rows])
            twin(x, y)
        ours, theirs = head.schedule, twin.schedule
        assert_close(ours.class_cosines, theirs.class_cosines, "cosines of the classes", 1e-5)
        assert_close(ours.share, theirs.share, "share", 1e-3)
        assert theirs.share > 0
        assert all(map(same_everywhere, ours.buffers()))


def lam_of_groups(world: World) -> None:
    """On a mesh each group of classes follows the angle of its own batches, and lam drifts apart,
    until the buffers are sent as the documentation says.
    """
    mesh = dist.init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("data", "class"))
    head = ClassParallelLSoftmaxLoss(D, C, margin=3, process_group=mesh["class"])
    twin = plain_twin(head)
    torch.manual_seed(world.seed + mesh.get_local_rank("data"))
    for _ in range(4):
        x = torch.randn(ROWS, D)
        y = nearest(x, twin)
        head(x, y).backward()
    assert not same_everywhere(head.schedule.share), "nothing to be sent"
    for buffer in head.schedule.buffers():
        dist.broadcast(buffer, group_src=0, group=mesh.get_group("data"))
    assert head.schedule.steps == 4
    assert head.schedule.share > 0
    assert same_everywhere(head.schedule.upcoming())
    head(x, y)  # and goes on
    assert head.schedule.steps == 5
