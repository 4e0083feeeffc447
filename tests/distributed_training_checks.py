"""The class-parallel layer in training: backbones, averages, sampling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
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


def clipped_by_the_largest(world: World) -> None:
    """The infinity norm where the last process has no class: torch knows no largest of nothing."""
    few = 2 * world.size - 2
    head = ClassParallelLSoftmaxLoss(D, few, dtype=torch.float64)
    assert (len(head.linear.classes) == 0) == (world.rank == world.size - 1)
    twin = plain_twin(head)
    n = sum(world.sizes)
    x, y = torch.randn(n, D, dtype=torch.float64), torch.randint(few, (n,))
    plain = [nn.Parameter(torch.zeros(size)) for size in (3, 0)]  # one without numbers
    for scale in (0.0, 100.0):  # the largest is in W, then not
        for layer, rows in ((head, world.rows), (twin, slice(None))):
            layer.zero_grad()
            layer(x[rows], y[rows]).backward()
        for parameter in plain:
            parameter.grad = torch.full_like(parameter, scale)
        largest = max(scale, twin.linear.weight.grad.abs().max().item())
        expected = twin.linear.weight.grad * (1e-3 / largest)
        norm = clip_grad_norm_([*head.parameters(), *plain], 1e-3, torch.inf)
        assert_close(norm, torch.tensor(largest), "norm", 1e-6)
        assert same_everywhere(norm)
        assert_close(whole(head.linear.weight.grad), expected, "gradient", 1e-5)


def scaled_gradients(world: World) -> None:
    """A GradScaler with an optimizer for the backbone and one for the head, as docs/distributed.md
    has it: the training of one process. Where the rows of one process alone overflow all processes
    pass over that step, and lower the scale; the last one has no rows.
    """
    twin_backbone = backbone_of(torch.float32)
    backbone = DistributedDataParallel(copy.deepcopy(twin_backbone))
    few = 2 * world.size - 2
    head = ClassParallelLSoftmaxLoss(D, few, lam=1.0)
    twin = plain_twin(head, lam=1.0)
    trained = (backbone, head, world.rows), (twin_backbone, twin, slice(None))
    optimizers = [[sgd(body), sgd(last)] for body, last, _ in trained]
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in trained]
    for number, (x, y) in enumerate(batches(world, 4)):
        bad, overflow = number in (1, 2), (torch.inf, torch.nan)[number % 2]
        before = whole(head.linear.weight).clone()
        for (body, last, rows), both, scaler in zip(trained, optimizers, scalers, strict=True):
            scaler.scale(last(body(x[rows].float()), y[rows] % few)).backward()
            if bad and last is twin:
                last.linear.weight.grad[0, 0] = overflow
            elif bad and world.rank == 0:
                last.linear.weight.grad.to_local()[0, 0] = overflow
            for optimizer in both:
                scaler.unscale_(optimizer)
            clip = clip_grad_norm_ if last is head else nn.utils.clip_grad_norm_
            norm = clip([*body.parameters(), *last.parameters()], 0.05)
            assert norm.isfinite() == (not bad)
            for optimizer in both:
                if norm.isfinite():
                    scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale() == 256.0 / 2 ** min(number, 2)
        assert torch.equal(whole(head.linear.weight), before) == bad
    assert_close(whole(head.linear.weight), twin.linear.weight, "W", 1e-5)
    for ours, theirs in zip(backbone.parameters(), twin_backbone.parameters(), strict=True):
        assert_close(ours, theirs, "parameter", 1e-5)
    scalers[0].scale(head(backbone(x[world.rows].float()), y[world.rows] % few)).backward()
    together = sgd(backbone, head)
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        scalers[0].step(together)  # as the documentation says


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
