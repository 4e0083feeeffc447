"""The loss in pytorch-metric-learning's clothes, beside the library's own."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("pytorch_metric_learning", reason="needs pytorch-metric-learning")

from pytorch_metric_learning import losses, miners, reducers, regularizers
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance

import lsoftmax
from lsoftmax import LambdaSchedule, reference
from lsoftmax.metric_learning import LargeMarginSoftmaxLoss

C, D = 5, 6


def batch(n: int = 24) -> tuple[Tensor, Tensor]:
    return 2 * torch.randn(n, D, dtype=torch.float64), torch.randint(C, (n,))


def pair(**options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and the library's with the same W, in float64."""
    theirs = losses.LargeMarginSoftmaxLoss(C, D, **copy.deepcopy(options)).double()
    ours = LargeMarginSoftmaxLoss(C, D, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_alike(ours: torch.nn.Module, theirs: torch.nn.Module, x: Tensor, *args: Any) -> None:
    """Values and both gradients."""
    results = []
    for function in (ours, theirs):
        leaf = x.clone().requires_grad_()
        value = function(leaf, *args)
        weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
        (value * weights).sum().backward()
        results.append((value.detach(), leaf.grad, function.W.grad))
        function.zero_grad()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert results[0][2].any()


@pytest.mark.parametrize("margin", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1, 0.25])
def test_the_librarys_numbers(margin: int, scale: float) -> None:
    ours, theirs = pair(margin=margin, scale=scale)
    x, y = batch()
    assert_alike(ours, theirs, x, y)
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x))


@pytest.mark.parametrize(
    "reducer",
    [
        reducers.MeanReducer(),
        reducers.SumReducer(),
        reducers.AvgNonZeroReducer(),
        reducers.ThresholdReducer(low=1.5),
        reducers.ClassWeightedReducer(torch.rand(C)),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
def test_reducers(reducer: torch.nn.Module) -> None:
    ours, theirs = pair(reducer=reducer)
    assert_alike(ours, theirs, *batch())


def test_a_loss_for_each_embedding() -> None:
    ours, theirs = pair(reducer=reducers.DoNothingReducer())
    x, y = batch()
    a, b = (function(x, y)["loss"] for function in (ours, theirs))
    assert a.keys() == b.keys()
    torch.testing.assert_close(a["losses"], b["losses"])
    assert torch.equal(a["indices"], b["indices"])


@pytest.mark.parametrize(
    "miner",
    [
        miners.MultiSimilarityMiner(),
        miners.BatchHardMiner(),
        miners.TripletMarginMiner(),
        miners.PairMarginMiner(),
    ],
    ids=lambda miner: type(miner).__name__,
)
def test_miners(miner: torch.nn.Module) -> None:
    ours, theirs = pair(margin=3)
    x, y = batch()
    indices = miner(x, y)
    assert_alike(ours, theirs, x, y, indices)
    assert not torch.equal(ours(x, y, indices), ours(x, y)), "the miner changed nothing"


def test_regularizers_and_initialisation() -> None:
    ours, theirs = pair(
        embedding_regularizer=regularizers.LpRegularizer(),
        embedding_reg_weight=0.3,
        weight_regularizer=regularizers.RegularFaceRegularizer(),
        weight_reg_weight=0.7,
        weight_init_func=torch.nn.init.orthogonal_,
        distance=CosineSimilarity(),
    )
    assert_alike(ours, theirs, *batch())
    assert ours.sub_loss_names() == theirs.sub_loss_names()
    for init in (None, torch.nn.init.orthogonal_):
        made = []
        for kind in (LargeMarginSoftmaxLoss, losses.LargeMarginSoftmaxLoss):
            torch.manual_seed(3)
            made.append(kind(C, D, weight_init_func=init).W)
        assert torch.equal(*made), "one seed, one W"


def test_what_it_is() -> None:
    ours = LargeMarginSoftmaxLoss(C, D, margin=3)
    assert isinstance(ours, losses.LargeMarginSoftmaxLoss)
    assert [(name, value.shape) for name, value in ours.state_dict().items()] == [("W", (D, C))]
    assert ours.W.t().is_contiguous()


def test_statistics() -> None:
    ours, theirs = pair(collect_stats=True)
    x, y = batch()
    ours(x, y)
    theirs(x, y)
    assert ours.avg_angle == pytest.approx(theirs.avg_angle, rel=1e-6)
    assert ours._record_these == theirs._record_these


def test_trainings_are_exchanged_both_ways() -> None:
    """Weights and the optimizer's momentum, ours to theirs and back; and W stays as it lies."""
    one, other = pair(margin=2)
    data = [batch() for _ in range(6)]

    def adam(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=0.01)

    def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> None:
        for x, y in data[part]:
            optimizer.zero_grad()
            module(x, y).backward()
            optimizer.step()

    straight, straight_optimizer = copy.deepcopy(other), None
    straight_optimizer = adam(straight)
    train(straight, straight_optimizer, slice(6))
    optimizer = adam(one)
    train(one, optimizer, slice(2))
    for module in (other, one):  # now the library's, then ours again
        continued = adam(module)
        module.load_state_dict((one if module is other else other).state_dict())
        continued.load_state_dict(optimizer.state_dict())
        start = 2 if module is other else 4
        train(module, continued, slice(start, start + 2))
        optimizer = continued
    torch.testing.assert_close(one.W, straight.W, rtol=1e-9, atol=1e-11)
    assert one.W.t().is_contiguous()
    assert one.W.grad.t().is_contiguous(), "a gradient that lies otherwise is copied every step"


def test_annealing() -> None:
    """lam of the first step is lam(1); a checkpoint carries the step; evaluation takes none."""
    schedule = LambdaSchedule(10.0, 0.5, 2.0)
    ours = LargeMarginSoftmaxLoss(C, D, margin=3, lam=schedule).double()
    x, y = batch()
    value = ours(x, y)
    truth = reference.lsoftmax_loss(x, ours.W.t(), y, 3, schedule.value(1))
    torch.testing.assert_close(value, truth)
    ours.eval()
    ours(x, y)
    assert ours.schedule.steps == 1
    other = LargeMarginSoftmaxLoss(C, D, lam=LambdaSchedule(10.0, 0.5, 2.0))
    other.load_state_dict(ours.state_dict())
    assert other.lam == ours.lam
    other.load_state_dict(losses.LargeMarginSoftmaxLoss(C, D).state_dict())


def test_follows_the_embeddings_to_their_device() -> None:
    """As the library's losses do: to the meta device, for there may be no other."""
    ours = LargeMarginSoftmaxLoss(C, D, lam=LambdaSchedule.by_angle())
    x = torch.empty(4, D, device="meta", requires_grad=True)
    y = torch.zeros(4, dtype=torch.int64, device="meta")
    ours.compute_loss(x, y, None, x, y)
    assert ours.W.is_meta
    assert ours.W.t().is_contiguous()
    assert ours.lam.is_meta


def test_half_precision_and_autocast() -> None:
    ours = LargeMarginSoftmaxLoss(C, D)
    x, y = batch()
    truth = ours(x.bfloat16().double(), y)
    torch.testing.assert_close(ours(x.bfloat16(), y).double(), truth, rtol=2e-2, atol=1e-2)
    assert ours.W.dtype == torch.float32, "the library leaves its W in the type of the batch"
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(x.float(), y)
    value.backward()
    torch.testing.assert_close(value.double(), truth, rtol=2e-2, atol=1e-2)
    assert ours.W.grad.dtype == torch.float32


def test_zeros_can_leave_zero() -> None:
    """Ours has the softmax gradient there, the library's none."""
    ours, theirs = pair(margin=3)
    _, y = batch(4)
    gradients = []
    for function in (ours, theirs):
        zeros = torch.zeros(4, D, dtype=torch.float64, requires_grad=True)
        function(zeros, y).backward()
        gradients.append(zeros.grad)
    zeros = torch.zeros(4, D, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(F.linear(zeros, ours.W.t()), y).backward()
    torch.testing.assert_close(gradients[0], zeros.grad)
    assert not gradients[1].any()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"margin": 2.5}, TypeError, "margin"),
        ({"margin": 0}, ValueError, "margin"),
        ({"scale": 0}, ValueError, "scale"),
        ({"lam": -1.0}, ValueError, "lam"),
        ({"memory_budget": 0}, ValueError, "memory_budget"),
        ({"distance": CosineSimilarity(p=1)}, ValueError, "p=1"),
        ({"distance": LpDistance()}, AssertionError, "CosineSimilarity"),
    ],
)
def test_wrong_arguments(wrong: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        LargeMarginSoftmaxLoss(C, D, **wrong)


def test_wrong_calls() -> None:
    ours = LargeMarginSoftmaxLoss(C, D)
    x, y = batch()
    with pytest.raises(ValueError, match="labels"):
        ours(x)
    with pytest.raises(ValueError, match="ref_emb"):
        ours(x, y, ref_emb=x.clone(), ref_labels=y.clone())


def test_only_this_module_imports_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in Path(lsoftmax.__file__).parent.glob("*.py"):
        assert path.stem == "metric_learning" or "pytorch_metric_learning" not in path.read_text()
    monkeypatch.delitem(sys.modules, "lsoftmax.metric_learning")
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)  # as if not installed
    with pytest.raises(ModuleNotFoundError, match="pip install pytorch-metric-learning"):
        importlib.import_module("lsoftmax.metric_learning")


def test_counts_classes_as_the_layer_does() -> None:
    """W lies the other way round there. Red if the rows' angle is what counts."""
    schedules = [LambdaSchedule.by_angle(num_classes=C) for _ in range(2)]
    ours = LargeMarginSoftmaxLoss(C, D, margin=3, lam=schedules[0])
    layer = lsoftmax.LSoftmaxLoss(D, C, margin=3, lam=schedules[1])
    layer.linear.weight.data.copy_(ours.W.detach().t())
    x, y = batch()
    for _ in range(2):
        ours(x.float(), y)
        layer(x.float(), y)
    for name, number in layer.schedule.named_buffers():
        torch.testing.assert_close(getattr(ours.schedule, name), number)
