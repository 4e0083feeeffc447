"""The layer of one process in a data-parallel model, DDP's and FSDP2's, beside the whole batch."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lsoftmax
from distributed_run import World, assert_close, same_everywhere
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
