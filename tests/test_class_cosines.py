"""Annealing that counts every class alike: the running means of the classes' cosines."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from annealed import counted, held
from lsoftmax import LambdaSchedule, LSoftmaxLinear, LSoftmaxLoss

C, D = 7, 5
ops = torch.ops.lsoftmax


def fresh(device: str, classes: int = C) -> Tensor:
    return LambdaSchedule.by_angle(num_classes=classes).class_cosines.to(device)


def rows(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Features, class vectors and targets, some classes rare and the last one absent."""
    target = torch.tensor([50.0, 9, 9, 3, 1, 1]).multinomial(max(n, 1), True)[:n]
    scale = 10 ** torch.randn(n, 1)
    return (scale * torch.randn(n, D)).to(dtype), torch.randn(C, D).to(dtype), target


@pytest.fixture
def wide_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class Means:
    """The same in Python's floats, a row at a time."""

    def __init__(self) -> None:
        self.of_class: dict[int, tuple[float, float]] = {}

    def take_in(self, x: Tensor, w: Tensor, target: Tensor, ignore_index: int = -100) -> float:
        rows: list[tuple[float, int]] = []
        for features, label in zip(x.double(), target.tolist(), strict=True):
            if label != ignore_index:
                vector = w[label].double()
                size = float(features.norm() * vector.norm())
                cosine = float(features @ vector) / size if size > 0 else 0.0
                rows.append((0.0 if math.isnan(cosine) else cosine, label))
        return self.count(rows)

    def count(self, rows: list[tuple[float, int]]) -> float:
        batch: dict[int, list[float]] = {}
        for cosine, label in rows:
            batch.setdefault(label, []).append(cosine)
        for label, cosines in batch.items():
            now = statistics.mean(cosines), statistics.mean(c * c for c in cosines)
            old = self.of_class.get(label, now)
            self.of_class[label] = tuple(0.7 * a + 0.3 * b for a, b in zip(old, now, strict=True))
        if not batch:
            return math.inf
        mean, square = (statistics.mean(each) for each in zip(*self.of_class.values(), strict=True))
        return mean - math.sqrt(square - mean * mean)


def taken_in(state: Tensor, *batch: Tensor) -> Tensor:
    x, w, target = (tensor.to(state.device) for tensor in batch)
    cosines = ops.own_cosines(x, w, target, -100)
    return ops.count_classes_(state, cosines, target, 0.7)


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e15, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiny_and_huge_rows(size: float, dtype: torch.dtype, device: str) -> None:
    """Whose squares no float32 holds."""
    x, w = torch.randn(20, D), torch.randn(C, D)
    y = torch.arange(20) % C
    x = (size * x).to(dtype)
    w = (size * w).to(dtype)
    cosines = ops.own_cosines(x.to(device), w.to(device), y.to(device), -100).cpu()
    truth = torch.cosine_similarity(x.double() / size, w[y].double() / size, dim=1)
    torch.testing.assert_close(cosines.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("wide_default")
def test_another_default_type(device: str) -> None:
    state, expected = fresh(device), Means()
    for n in (30, 5):
        x, w, target = rows(n)
        low = float(taken_in(state, x.float(), w.float(), target))
        assert low == pytest.approx(expected.take_in(x, w, target), rel=1e-4, abs=1e-5)
    assert state.dtype == torch.float32


def test_a_batch_of_millions(device: str) -> None:
    """All of one class, as the pixels of a few images are. Red if their sum has no room."""
    n = 2**23 + 5
    state, cosines = fresh(device), torch.ones(n, device=device)
    ops.count_classes_(state, cosines, torch.zeros(n, dtype=torch.int64, device=device), 0.7)
    assert state[:, 0].tolist() == [1, 1]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_running_means(device: str, dtype: torch.dtype) -> None:
    """Red if rows count instead of classes, a class that has not come yet counts, or ignored rows
    do; or if a zero or a NaN row does not count as 90 degrees.
    """
    expected, state = Means(), fresh(device)
    for n in (40, 0, 3, 1, 200):
        x, w, target = rows(n, dtype)
        target[::5] = -100
        x[1:2] = 0.0
        x[2:3] = math.nan
        low = float(taken_in(state, x, w, target))
        assert low == pytest.approx(expected.take_in(x, w, target), rel=1e-4, abs=1e-5)
    assert state[:, -1].tolist() == [0, -1], "the absent class"
    for label, moments in expected.of_class.items():
        assert state[:, label].tolist() == pytest.approx(moments, rel=1e-4, abs=1e-5)


def test_order_of_the_rows(device: str) -> None:
    """Bit for bit. Red if sums are of floating-point numbers, in the order of atomics."""
    target = rows(500)[2].to(device)
    cosines = (torch.randn(500) * 10 ** (-8 * torch.rand(500))).to(device)
    states = [fresh(device) for _ in range(2)]
    order = torch.randperm(500).to(device)
    low = ops.count_classes_(states[0], cosines, target, 0.7)
    assert torch.equal(low, ops.count_classes_(states[1], cosines[order], target[order], 0.7))
    assert torch.equal(*states)


@pytest.mark.parametrize("classes", [1, 513, 2049, 7000])
def test_many_classes(classes: int, device: str) -> None:
    """More than the kernels' threads and blocks, each class in its place."""
    expected, state = Means(), fresh(device, classes)
    for n in (3000, 1, 700):
        target, cosines = torch.randint(classes, (n,)), torch.rand(n) * 2 - 1
        low = ops.count_classes_(state, cosines.to(device), target.to(device), 0.7)
        rows = list(zip(cosines.tolist(), target.tolist(), strict=True))
        assert float(low) == pytest.approx(expected.count(rows), rel=1e-4, abs=1e-5)
    moments = torch.zeros(2, classes, dtype=torch.float64)
    moments[1] = -1
    for label, known in expected.of_class.items():
        moments[:, label] = torch.tensor(known)
    torch.testing.assert_close(state.cpu().double(), moments, rtol=1e-5, atol=1e-6)


def test_opcheck(device: str) -> None:
    x, w, target = (tensor.to(device) for tensor in rows(9))
    cosines = ops.own_cosines(x, w, target, 3)
    torch.library.opcheck(ops.own_cosines.default, (x, w, target, 3))
    torch.library.opcheck(ops.count_classes_.default, (fresh(device), cosines, target, 0.7))


def test_sanitizer_smoke_of_classes(device: str) -> None:
    """Two training steps of the layer, a row ignored and a class absent: see test_loss.py's."""
    head = head_of(LSoftmaxLoss, LambdaSchedule.by_angle(num_classes=C)).to(device)
    x, y = torch.randn(3, D, device=device), torch.tensor([1, -100, 6], device=device)
    for _ in range(2):
        head(x, y).backward()
    assert head.schedule.class_cosines[1].cpu().ge(0).tolist() == [k in (1, 6) for k in range(C)]


def head_of(layer: type, schedule: LambdaSchedule, **options) -> nn.Module:
    return layer(D, C, margin=3, lam=schedule, **options)


@pytest.mark.parametrize("layer", [LSoftmaxLoss, LSoftmaxLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_go_by_it(layer: type, dtype: torch.dtype, device: str) -> None:
    """In training only; the loss of a step is what it was."""
    options = {"dtype": dtype, "device": device}
    head = head_of(layer, LambdaSchedule.by_angle(num_classes=C), **options)
    twin = LambdaSchedule.by_angle()
    plain = head_of(layer, LambdaSchedule.by_angle(), **options)
    weight = getattr(head, "linear", head).weight
    getattr(plain, "linear", plain).weight.data.copy_(weight)
    expected = Means()
    for step in range(4):
        x, _, y = rows(20)
        w = weight.detach().cpu()
        noise = (0.2 + 0.1 * y).unsqueeze(1) * F.normalize(x, dim=1)  # rare classes are farther
        x = (F.normalize(w[y].float(), dim=1) + noise).to(dtype)
        twin.observe(torch.tensor(expected.take_in(x, w, y)), 3)
        x, y = x.to(device), y.to(device)
        output, by_rows = head(x, y), plain(x, y)
        if step == 0:
            assert torch.equal(output, by_rows)
        assert float(head.schedule.share) == pytest.approx(float(twin.share), rel=1e-3)
        before = head.schedule.class_cosines.clone()
        with torch.no_grad():
            head(x, y)
        assert torch.equal(head.schedule.class_cosines, before)
    assert head.schedule.share < 0.99 * plain.schedule.share
    assert not head.schedule.class_cosines.requires_grad


def test_one_feature(device: str) -> None:
    head = head_of(LSoftmaxLoss, LambdaSchedule.by_angle(num_classes=C)).to(device)
    vector = head.linear.weight.detach()[2]
    head(vector, torch.tensor(2, device=device))
    assert head.schedule.class_cosines[:, 2].tolist() == pytest.approx([1, 1])


def test_ignored_rows(device: str) -> None:
    schedule = LambdaSchedule.by_angle(num_classes=C)
    head = head_of(LSoftmaxLoss, schedule, ignore_index=3, device=device)
    x, y = torch.randn(30, D, device=device), torch.arange(30, device=device) % 4
    head(x, y)
    known = head.schedule.class_cosines[1] >= 0
    assert known.tolist() == [True] * 3 + [False] * 4
    share = head.schedule.share.clone()
    head(x, torch.full_like(y, 3))
    head(x[:0], y[:0])
    assert head.schedule.share == share, "no row says nothing of the angle"


def test_a_rare_class_holds_lam_up() -> None:
    """One row in a hundred is far from its class: that is one class of seven."""
    heads = [
        head_of(LSoftmaxLoss, LambdaSchedule.by_angle(num_classes=count)) for count in (None, C)
    ]
    heads[1].linear.load_state_dict(heads[0].linear.state_dict())
    weight = heads[0].linear.weight.detach()
    y = torch.arange(100) % (C - 1)
    y[-1] = C - 1
    x = weight[y]
    x[-1] = -x[-1]
    for head in heads:
        for _ in range(100):
            head(x, y)
    rows_lam, classes_lam = (float(head.lam) for head in heads)
    assert rows_lam < 0.5 * classes_lam


# ---- state ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_counted_no_classes_begins_to() -> None:
    old, new = (LSoftmaxLoss(6, 5, margin=3, lam=schedule()) for schedule in (held, counted))
    x, y = torch.randn(9, 6), torch.arange(9) % 5
    for head in (old, new):
        head(x, y)
    begun = counted().class_cosines
    assert not torch.equal(new.schedule.class_cosines, begun)
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.schedule.class_cosines, begun)
    assert new.schedule.steps == 1
    assert torch.equal(new.schedule.share, old.schedule.share)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*schedule\.class_cosines"):
        old.load_state_dict(new.state_dict())


def test_types_and_reset() -> None:
    head = LSoftmaxLoss(6, 5, margin=3, lam=counted())
    head(torch.randn(9, 6), torch.arange(9) % 5)
    before = head.schedule.class_cosines.clone()
    head.half().double()
    assert torch.equal(head.schedule.class_cosines, before)
    other = copy.deepcopy(head)
    other.schedule.reset_parameters()
    assert torch.equal(other.schedule.class_cosines, counted().class_cosines)
    assert torch.equal(head.schedule.class_cosines, before)


def test_pickled_before_classes_were_counted() -> None:
    head = LSoftmaxLoss(6, 5, margin=3, lam=held())
    del head.schedule.num_classes
    head(torch.randn(9, 6), torch.arange(9) % 5)
    assert head.schedule.steps == 1


# ---- errors --------------------------------------------------------------------------------------


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="num_classes: expected a keep"):
        LambdaSchedule(1000.0, 0.1, 2.0, num_classes=5)
    with pytest.raises(ValueError, match="num_classes: expected a keep"):
        LambdaSchedule.for_steps(100, keep=None, num_classes=5)
    for wrong, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="num_classes: expected an integer >= 1"):
            LambdaSchedule.by_angle(num_classes=wrong)
    for layer in (LSoftmaxLoss, LSoftmaxLinear):
        with pytest.raises(ValueError, match=r"lam\.num_classes: expected 7, got 5"):
            head_of(layer, counted())


def test_a_schedule_exchanged_for_one_of_other_classes() -> None:
    head = head_of(LSoftmaxLoss, LambdaSchedule.by_angle())
    head.schedule = counted()
    with pytest.raises(ValueError, match=r"schedule\.num_classes: expected 7, got 5"):
        head(*rows(4)[::2])


def test_what_the_kernels_refuse(device: str, backend: str) -> None:
    if backend == "portable":
        pytest.skip("checks of the compiled ops")
    state, cosines = fresh(device), torch.ones(3, device=device)
    target = torch.arange(3, device=device)
    for wrong, message in (
        ((state.t().contiguous().t(), cosines, target), "classes: expected them contiguous"),
        ((state[:1], cosines, target), r"classes: expected shape \[2, 7\]"),
        ((state.double(), cosines, target), "classes: expected Float"),
        ((state, cosines.double(), target), "cosines: expected Float"),
        ((state, cosines, target[:2]), r"target: expected shape \[3\]"),
        ((state, cosines, target.int()), "target: expected Long"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.count_classes_(*wrong, 0.7)


def test_words() -> None:
    assert "keep=0.6, num_classes=5" in repr(counted())
    assert "num_classes" not in repr(held())
