"""What the processes tell each other, how much of it, and when."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_checks import C, D, batch
from distributed_run import World, assert_close, plain_twin
from lsoftmax import class_parallel
from lsoftmax.distributed import ClassParallelLSoftmaxLoss

_reduce_scatter = class_parallel._reduce_scatter


class Volume(TorchDispatchMode):
    """Counts what torch.distributed is really asked to do: numbers that enter a collective on this
    process, or leave it where that is more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for a in args[:2] for t in (a if isinstance(a, list) else [a])]
            sizes = [t.numel() for t in tensors if isinstance(t, Tensor)]
            self.numbers[func._schema.name.removeprefix("c10d::")] += max(sizes)
        return func(*args, **(kwargs or {}))


def volume(world: World) -> None:
    """docs/distributed.md: N D + N gathered, a few numbers a row reduced, N D reduce-scattered."""
    for rows in (4, 16):
        n = rows * world.size
        counts = []
        known = {"max_local_batch": rows}
        for options in ({}, known, {**known, "lam": 1.0}, {**known, "reduction": "none"}):
            head = ClassParallelLSoftmaxLoss(D, C, **options)
            with Volume() as counted:
                x = torch.randn(rows, D, requires_grad=True)
                head(x, torch.randint(C, (rows,))).sum().backward()
            counts.append(counted.numbers)
        gathered = {"_allgather_base_": n * D + n, "_reduce_scatter_base_": n * D}
        assert counts == [
            {**gathered, "allreduce_": 9 * n + 2},  # and the size of the largest batch
            {**gathered, "allreduce_": 9 * n},
            {**gathered, "allreduce_": 8 * n},  # no angle to be measured
            {**gathered, "allreduce_": 9 * n + n},  # and what the losses are multiplied by
        ]


def frozen_backbone(world: World) -> None:
    """No gradient of x: nothing is reduce-scattered. Where one process alone has no need of it,
    as for a batch without rows, it takes part all the same.
    """
    x, y = batch(world)
    for wanted in (set(), {0}):
        head = ClassParallelLSoftmaxLoss(D, C, dtype=torch.float64)
        mine = x[world.rows].clone().requires_grad_(world.rank in wanted)
        with Volume() as volume:
            head(mine, y[world.rows]).backward()
        assert (volume.numbers["_reduce_scatter_base_"] > 0) == bool(wanted)
        assert (mine.grad is not None) == (world.rank in wanted)
    # Where nobody asks what the others need, all take part in everything: none waits for ever.
    head = ClassParallelLSoftmaxLoss(D, C, dtype=torch.float64, max_local_batch=max(world.sizes))
    mine = x[world.rows].clone().requires_grad_(world.rank == 0)
    head(mine, y[world.rows]).backward()
    assert (mine.grad is not None) == (world.rank == 0)


def frozen_classes(world: World) -> None:
    """W frozen, and one process alone wants the gradient of its features: right there, and no other
    process, the one without rows among them, raises or leaves it waiting.
    """
    x, y = batch(world)
    for size in (None, max(world.sizes)):
        for wanted in range(world.size):
            head = ClassParallelLSoftmaxLoss(D, C, dtype=torch.float64, max_local_batch=size)
            head.linear.weight.requires_grad_(False)
            twin = plain_twin(head)
            rows = x.clone().requires_grad_()
            twin(rows, y).backward()
            mine = x[world.rows].clone().requires_grad_(world.rank == wanted)
            head(mine, y[world.rows]).backward()
            assert (mine.grad is not None) == (world.rank == wanted)
            if world.rank == wanted:
                assert_close(mine.grad / world.size, rows.grad[world.rows], "dX")
            assert head.linear.weight.grad is None


class Made(TorchDispatchMode):
    """The matrices that operations make, by shape and type: one for each piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices: Counter[tuple[tuple[int, ...], torch.dtype]] = Counter()
        self._seen: list[Tensor] = []  # kept, so that no memory is given out twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if type(out) is Tensor and out.dim() == 2:  # a DTensor has no memory of its own
            start = out.untyped_storage().data_ptr()
            if start not in [other.untyped_storage().data_ptr() for other in self._seen]:
                self.matrices[tuple(out.shape), out.dtype] += 1
            self._seen.append(out)
        return out


def features_once(world: World) -> None:
    """The gathered features are there once, also where rows are ignored: each process takes out its
    own before they set out. (On a GPU, where nobody looks, any row may be.)
    """
    x, y = batch(world)
    y[0] = -100
    size = max(world.sizes)
    head = ClassParallelLSoftmaxLoss(D, C, dtype=torch.float64, max_local_batch=size)
    with Made() as made:
        head(x[world.rows].requires_grad_(), y[world.rows])
    assert made.matrices[(size * world.size, D), torch.float64] == 1


def sample_is_cast(world: World) -> None:
    """Under autocast the sampled rows of W go to bfloat16 and back, not all of the shard."""
    many = 40 * world.size
    head = ClassParallelLSoftmaxLoss(D, many, sample_rate=0.5, lam=1.0)
    n = sum(world.sizes)
    x, y = torch.randn(n, D, requires_grad=True), torch.randint(many, (n,))
    with Made() as made:
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(x[world.rows], y[world.rows])
        loss.backward()
    assert made.matrices[(20, D), torch.bfloat16] > 0
    assert made.matrices[(40, D), torch.bfloat16] == 0
    grad = head.linear.weight.grad
    assert grad.dtype == torch.float32
    assert 0 < grad.to_local().any(1).sum() <= 20


class Order(TorchDispatchMode):
    """Notes when the products of backward are computed, and when their sums set out and arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.lsoftmax.shard_bwd.default:
            self.events += [
                name for name, need in zip(("dX", "dW"), args[-2:], strict=True) if need
            ]
        return out

    def reduce_scatter(self, *args: Any, **kwargs: Any) -> Any:
        self.events.append("sets out")
        self.work = _reduce_scatter(*args, **kwargs)
        return self

    def wait(self) -> None:
        self.events.append("arrives")
        self.work.wait()


def dx_travels_meanwhile(world: World) -> None:
    """While dW is computed; but for chunks, whose exponentials are made once for both."""
    x, y = batch(world)
    for options, expected in (
        ({}, ["dX", "sets out", "dW", "arrives"]),
        ({"memory_budget": 1}, ["dX", "dW", "sets out", "arrives"]),
    ):
        head = ClassParallelLSoftmaxLoss(D, C, **options)
        loss = head(x[world.rows].float().requires_grad_(), y[world.rows])
        with pytest.MonkeyPatch.context() as patch, Order() as order:
            patch.setattr(class_parallel, "_reduce_scatter", order.reduce_scatter)
            loss.backward()
        assert order.events == expected
