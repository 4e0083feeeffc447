"""Loss and gradients of the class-parallel layer against the layer of one process, in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import lsoftmax
from distributed_run import World, assert_close, plain_twin, same_everywhere
from lsoftmax.distributed import ClassParallelLSoftmaxLoss
from problems import nearest

D, C = 6, 11  # eight processes: five with two classes, one with one, two with none


def batch(world: World, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    n = sum(world.sizes)
    return scale * torch.randn(n, D, dtype=torch.float64), torch.randint(C, (n,))


def compare(world: World, x: Tensor, y: Tensor, margin: int = 4, **options: Any) -> None:
    """One call of the layer and of its twin: the loss, the same bits everywhere, dX and dW.
    "positive": W is. "near": targets that are not ignored become those that the rows are nearest.
    """
    ours = {key: options.pop(key) for key in ("max_local_batch", "averaged") if key in options}
    positive, near = options.pop("positive", False), options.pop("near", False)
    head = ClassParallelLSoftmaxLoss(D, C, margin, dtype=torch.float64, **options, **ours)
    if positive:
        head.linear.local().detach().abs_()
    twin = plain_twin(head, **options)
    if near:
        y = torch.where(y == twin.ignore_index, y, nearest(x, twin))
    whole = x.clone().requires_grad_()
    truth = twin(whole, y)
    upstream = torch.linspace(0.5, 1.5, max(1, truth.numel()), dtype=torch.float64)
    upstream = upstream[: truth.numel()].reshape(truth.shape)
    (truth * upstream).sum().backward()

    mine = x[world.rows].clone().requires_grad_()
    loss = head(mine, y[world.rows])
    if head.reduction == "none":
        truth, upstream = truth[world.rows], upstream[world.rows]
    else:
        assert same_everywhere(loss.detach())
    (loss * upstream).sum().backward()
    factor = world.size if ours.get("averaged", True) else 1
    assert_close(loss, truth, "loss")
    assert_close(head.schedule.share, twin.schedule.share, "angle", 1e-5)
    assert_close(mine.grad / factor, whole.grad[world.rows], "dX")
    assert_close(head.linear.weight.grad.full_tensor(), twin.linear.weight.grad, "dW")
    with torch.no_grad():
        assert_close(head(mine, y[world.rows]), truth, "loss without gradients")
    assert_close(head.schedule.share, twin.schedule.share, "angle after a silent pass", 1e-4)
    assert twin.schedule.share > 0 or not near


def options_of_the_loss(world: World) -> None:
    """Red for a wrong offset of a shard, a lost maximum, a factor R, another shard's dW."""
    x, y = batch(world)
    weight = torch.rand(C, dtype=torch.float64) + 0.5
    compare(world, x, y, lam=1.0)
    compare(world, x, y, margin=1, lam=0.0, averaged=False)
    compare(world, x, y, margin=3, lam=0.2, reduction="sum", weight=weight)
    compare(world, x, y, lam=5.0, label_smoothing=0.1)
    compare(world, x, y, lam=5.0, label_smoothing=0.1, weight=weight, reduction="none")
    compare(world, x, y, lam=0.5, max_local_batch=9, reduction="none")


def chunks(world: World) -> None:
    """The same where a panel of a few classes is all there is of the logits."""
    x, y = batch(world)
    weight = torch.rand(C, dtype=torch.float64) + 0.5
    compare(world, x, y, lam=1.0, memory_budget=1)
    compare(world, x, y, lam=1.0, memory_budget=1, label_smoothing=0.1, weight=weight)


def ignored_rows(world: World) -> None:
    """They may hold anything; and a batch may have no others."""
    x, y = batch(world)
    y[::3] = -7
    x[0], x[3] = torch.nan, torch.inf
    compare(world, x, y, ignore_index=-7, label_smoothing=0.1, near=True)
    compare(world, x, y, lam=1.0, ignore_index=-7, memory_budget=1, max_local_batch=8)
    compare(world, x, y.fill_(-7), ignore_index=-7, reduction="sum")


def logits_far_apart(world: World) -> None:
    """Rows whose target lies hundreds below or above the logits of other shards: a shard's share
    of the exponentials vanishes, the target's part of the gradient does not.
    """
    for lam in (0.0, 1000.0):
        x, y = batch(world, scale=400.0)
        compare(world, x, y, lam=lam)
        compare(world, x, y, lam=lam, memory_budget=1, label_smoothing=0.2)
    x, y = batch(world, scale=4000.0)
    compare(world, -x.abs(), y, lam=1.0, positive=True)  # all logits far below 0


def targets_of_one_shard(world: World) -> None:
    x, y = batch(world)
    compare(world, x, y % 2, lam=1.0)
    compare(world, x, y.clamp(min=C - 1), lam=1.0)


def no_rows(world: World) -> None:
    head = ClassParallelLSoftmaxLoss(D, C, reduction="sum")
    x = torch.empty(0, D, requires_grad=True)
    loss = head(x, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == (0, D)
    assert not head.linear.weight.grad.full_tensor().any()


def float32_and_bfloat16(world: World) -> None:
    x, y = batch(world)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        head = ClassParallelLSoftmaxLoss(D, C, lam=1.0, dtype=dtype)
        mine = x[world.rows].to(dtype).requires_grad_()
        loss = head(mine, y[world.rows])
        loss.backward()
        w = head.linear.weight.full_tensor().detach().double().requires_grad_()
        rows = x.to(dtype).double().requires_grad_()
        truth = lsoftmax.reference.lsoftmax_loss(rows, w, y, 4, 1.0)
        truth.backward()
        assert loss.dtype == torch.float32
        assert (mine.grad.dtype, head.linear.weight.grad.dtype) == (dtype, dtype)
        assert_close(loss, truth, "loss", 1e-6)
        assert_close(mine.grad / world.size, rows.grad[world.rows], "dX", bound)
        assert_close(head.linear.weight.grad.full_tensor(), w.grad, "dW", bound)


def twice(world: World) -> None:
    """A second backward is right; a second derivative is an error and no wrong number."""
    x, y = batch(world)
    head = ClassParallelLSoftmaxLoss(D, C, dtype=torch.float64)
    mine = x[world.rows].clone().requires_grad_()
    loss = head(mine, y[world.rows])
    loss.backward(retain_graph=True)
    first = mine.grad.clone()
    loss.backward()
    assert torch.equal(mine.grad, 2 * first)
    loss = head(mine, y[world.rows])
    (grad,) = torch.autograd.grad(loss, mine, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def initial_weights(world: World) -> None:
    """Those of one process that draws with the same seed, however many there are."""
    torch.manual_seed(world.seed)
    head = ClassParallelLSoftmaxLoss(D, C)
    torch.manual_seed(world.seed)
    twin = lsoftmax.LSoftmaxLoss(D, C)
    assert torch.equal(head.linear.weight.full_tensor(), twin.linear.weight)


def target_outside(world: World) -> None:
    """Every process says so, so that none waits for another; and it was no training step."""
    head = ClassParallelLSoftmaxLoss(D, C, lam=lsoftmax.LambdaSchedule(10.0, 0.1, 1.0))
    y = torch.zeros(2, dtype=torch.int64)
    if world.rank == world.size - 1:
        y[1] = C
    with pytest.raises(IndexError, match=f"target {C} is out of bounds: expected 0 <= target < 11"):
        head(torch.randn(2, D), y)
    assert head.schedule.steps == 0
    head(torch.randn(2, D), y.zero_()).backward()
    assert head.schedule.steps == 1


def mesh_dimension(world: World) -> None:
    """A dimension of a mesh, or a group: the other dimension's processes have another batch."""
    mesh = dist.init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("data", "class"))
    x, y = batch(world)
    for group in (mesh["class"], mesh["class"].get_group()):
        torch.manual_seed(world.seed)
        head = ClassParallelLSoftmaxLoss(
            D, C, process_group=group, lam=1.0, dtype=torch.float64, reduction="sum"
        )
        twin = plain_twin(head, lam=1.0, reduction="sum")
        first = world.rank // 2 * 2
        members = slice(sum(world.sizes[:first]), sum(world.sizes[: first + 2]))
        whole = x[members].clone().requires_grad_()
        truth = twin(whole, y[members])
        truth.backward()
        mine = x[world.rows].clone().requires_grad_()
        loss = head(mine, y[world.rows])
        loss.backward()
        assert_close(loss, truth, "loss")
        start = world.rows.start - members.start
        rows = slice(start, start + mine.shape[0])
        assert_close(mine.grad / 2, whole.grad[rows], "dX")
        assert_close(head.linear.weight.grad.full_tensor(), twin.linear.weight.grad, "dW")


def mesh_backwards(world: World) -> None:
    """A mesh whose order is not that of its group: rows would be saved in each other's places."""
    ranks = list(range(world.size))
    mesh = DeviceMesh("cpu", ranks[::-1])
    text = re.escape(f"expected a DeviceMesh in the order of its group, {ranks}, got {ranks[::-1]}")
    with pytest.raises(ValueError, match=text):
        ClassParallelLSoftmaxLoss(D, C, process_group=mesh)
    ClassParallelLSoftmaxLoss(D, C, process_group=DeviceMesh("cpu", ranks))


def other_devices(world: World) -> None:
    """The layer is where its mesh is, and what it makes in a step is where the features are,
    wherever the layer was made. "meta" stands for a second device.
    """
    mesh = DeviceMesh.from_group(dist.group.WORLD, "meta")
    with pytest.raises(ValueError, match="communicates on, got meta"):  # not W there, lam here
        ClassParallelLSoftmaxLoss(D, C, process_group=mesh)
    with pytest.raises(ValueError, match="device: expected the mesh's, meta, got cpu"):
        ClassParallelLSoftmaxLoss(D, C, process_group=mesh, device="cpu")
    asked, cpu_generator = [], torch.Generator()

    def generator(device: torch.device) -> torch.Generator:
        asked.append(torch.device(device))
        return cpu_generator

    far = torch.device("meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        patch.setattr(dist, "all_reduce", lambda sizes, *_, **__: asked.append(sizes.device))
        patch.setattr(torch, "Generator", generator)
        head = ClassParallelLSoftmaxLoss(D, C, sample_rate=0.5)
        with pytest.raises(RuntimeError, match="meta"):  # that asks for numbers
            head._agree(torch.empty(2, D, device=far))
        head.sampling(torch.empty(4, dtype=torch.int64, device=far), C, 0)
    assert asked[-2:] == [far, far]


def arguments(world: World) -> None:
    """Errors that say what was expected and what came."""
    whole = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "class"))
    for error, text, options in (
        (ValueError, r"process_group: expected a DeviceMesh of 1 dim", {"process_group": whole}),
        (ValueError, r"sample_rate: expected a number in \(0, 1\], got 0", {"sample_rate": 0}),
        (TypeError, r"sample_rate: expected a number in \(0, 1\], got str", {"sample_rate": "a"}),
        (ValueError, "seed: expected an integer >= 0, got -1", {"seed": -1}),
        (TypeError, "seed: expected an integer >= 0, got float", {"seed": 1.5}),
        (ValueError, "label_smoothing", {"sample_rate": 0.5, "label_smoothing": 0.1}),
        (ValueError, "max_local_batch: expected an integer >= 1", {"max_local_batch": 0}),
        (ValueError, "reduction: expected one of", {"reduction": "max"}),
        (ValueError, "weight: expected one per class", {"weight": torch.ones(C - 1)}),
        (ValueError, "device: expected one that the group", {"device": "meta"}),
    ):
        with pytest.raises(error, match=text):
            ClassParallelLSoftmaxLoss(D, C, **options)
    with pytest.raises(TypeError, match="num_classes: expected an integer >= 1, got float"):
        ClassParallelLSoftmaxLoss(D, 11.0)
    head = ClassParallelLSoftmaxLoss(D, C, max_local_batch=2)
    y = torch.zeros(3, dtype=torch.int64)
    for error, text, input, target in (
        (ValueError, "at most max_local_batch=2 rows, got 3", torch.ones(3, D), y),
        (ValueError, r"input: expected D = \d+ for linear_weight", torch.ones(3, 7), y),
        (ValueError, r"input: expected shape \(n, D\), got \(6,\)", torch.ones(D), y[0]),
        (TypeError, "target: expected int64", torch.ones(3, D), y.float()),
    ):
        with pytest.raises(error, match=text):
            head(input, target)
    assert "processes=1" in repr(head)
    assert "classes=0..11" in repr(head)
    assert same_everywhere(head.lam)
