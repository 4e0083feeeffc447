"""What a layer's annealing goes by and does in one step: the low cosine, and the two ops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

import lsoftmax
from lsoftmax import functional
from problems import problem

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORED = 3


def cosine_of(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    defaults = {
        "weight": None,
        "reduction": "mean",
        "ignore_index": IGNORED,
        "label_smoothing": 0.0,
        "memory_budget": None,
    }
    return functional.loss_and_cosine(x, w, y, 4, 0.5, **(defaults | options))[1]


def true_cosine(x: Tensor, w: Tensor, y: Tensor) -> float:
    """The mean less a standard deviation, in float64, row by row and by Python's statistics."""
    x, w = x.detach().cpu().double(), w.detach().cpu().double()
    found = []
    for row, label in zip(x, y.tolist(), strict=True):
        if label == IGNORED:
            continue
        norms = float(row.norm() * w[label].norm())
        found.append(float(row @ w[label]) / norms if norms else 0.0)
    return statistics.mean(found) - statistics.pstdev(found)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_low_cosine(dtype: torch.dtype, reduction: str, device: str) -> None:
    """In every regime, ignored and zero rows among the others, and near the class vector."""
    n, d, c = 600, 7, 20
    p = problem(n, d, c, dtype, device)
    x, w, y = p.x.detach().clone(), p.w.detach(), p.y.clone()
    y[:40] = IGNORED
    x[40:60] = 0
    x[60:160] = w[y[60:160]] * 3 + 0.05 * x[60:160]
    x[0] = math.nan  # ignored
    expected = true_cosine(x, w, y)
    weight = torch.rand(c, device=device) + 0.5
    for needs_grad in (False, True):
        x, w = x.requires_grad_(needs_grad), w.requires_grad_(needs_grad)
        for options in (
            {},
            {"weight": weight, "label_smoothing": 0.1},
            {"memory_budget": 8 * n * c // 3},  # chunks of classes
            {"memory_budget": 4 * ((n + c) * d + 257 * c)},  # of rows, but for "none"
        ):
            cosine = cosine_of(x, w, y, reduction=reduction, **options)
            assert cosine.dtype == torch.float32
            assert cosine.shape == ()
            assert not cosine.requires_grad
            assert float(cosine) == pytest.approx(expected, abs=1e-6), options


def test_the_regimes_above_are_three() -> None:
    n, d, c = 600, 7, 20
    x, w = torch.zeros(n, d, requires_grad=True), torch.zeros(c, d)
    budgets = (None, 8 * n * c // 3, 4 * ((n + c) * d + 257 * c))
    plans = [functional.plan(x, w, "mean", budget) for budget in budgets]
    assert [(bool(p.class_chunk), bool(p.row_chunk)) for p in plans] == [
        (False, False),
        (True, False),
        (False, True),
    ]


def test_rows_alike_have_no_deviation(device: str) -> None:
    """Nor has a single one; and their squares' rounding is no root of a negative number."""
    for n in (1, 2, *[700] * 10):
        p = problem(1, 5, 4, torch.float32, device)
        x, w, y = p.x.detach().expand(n, 5), p.w.detach(), p.y.expand(n)
        low = cosine_of(x, w, y, ignore_index=-100)
        true = float(torch.cosine_similarity(x[0].double(), w[y[0]].double(), dim=0))
        assert float(low) == pytest.approx(true, abs=1e-6)


def test_no_row_has_no_cosine(device: str) -> None:
    p = problem(5, 4, 6, torch.float32, device)
    assert cosine_of(p.x, p.w, torch.full_like(p.y, IGNORED)) == math.inf
    assert cosine_of(p.x[:0], p.w, p.y[:0]) == math.inf


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_low_cosine_of_the_logits_op(dtype: torch.dtype, device: str) -> None:
    p = problem(50, 9, 2, dtype, device)
    _, cosine = functional.logits_and_cosine(p.x, p.w, p.y, 4, 0.5)
    assert float(cosine) == pytest.approx(true_cosine(p.x, p.w, p.y), abs=1e-6)
    assert not cosine.requires_grad
    assert functional.logits_and_cosine(p.x[:0], p.w, p.y[:0], 4, 0.5)[1] == math.inf


def numbers(device: str, *values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float32, device=device) for value in values]


@pytest.mark.parametrize("least_share", [0.0, 0.01])
@pytest.mark.parametrize("curve", [(1000.0, 0.25, 2.0, 0.5), (1000.0, 2.5e-5, 35.0, 0.0)])
def test_upcoming_lam(curve: tuple[float, ...], least_share: float, device: str) -> None:
    base, gamma, power, minimum = curve
    for count in (0, 1, 7, 30_000, 2**40):
        steps = torch.tensor(count, device=device)
        for held in (0.0, 0.004, 0.3, 1.0):
            (share,) = numbers(device, held)
            lam = torch.ops.lsoftmax.upcoming_lam(steps, share, *curve, least_share)
            expected = max(minimum, base * (1 + gamma * (count + 1)) ** -power)
            if least_share:
                expected = max(expected, 1 / max(float(share), least_share) - 1)
            assert lam.dtype == torch.float32
            assert float(lam) == pytest.approx(expected, rel=2e-7, abs=1e-37)
            assert int(steps) == count


def test_anneal(device: str) -> None:
    margin, keep, memory = 3, 0.6, 0.9
    for cosine in (-0.5, 0.0, 0.2, 0.7, 0.95, 1.0, 1.0000001, math.nan, math.inf):
        steps = torch.tensor(41, device=device)
        lam, share, following, measured = numbers(device, 9.0, 0.25, 8.0, cosine)
        for next_lam, of_batch in ((following, None), (None, measured), (following, measured)):
            before = int(steps), float(lam), float(share)
            torch.ops.lsoftmax.anneal_(steps, lam, share, next_lam, of_batch, margin, keep, memory)
            assert int(steps) == before[0] + (next_lam is not None)
            assert float(lam) == (before[1] if next_lam is None else 8.0)
            expected = before[2]
            if of_batch is not None and cosine != math.inf:  # which says that there was no row
                c = 0.0 if math.isnan(cosine) else min(max(float(measured), 0.0), 1.0)
                psi = 1 - 2 * margin * math.acos(c) / math.pi
                allowed = min(1.0, (1 - keep) * c / max(c - psi, 1e-6))
                expected = memory * before[2] + (1 - memory) * allowed
            assert float(share) == pytest.approx(expected, rel=3e-7)


def test_share_of_a_curve_is_that_of_lam(device: str) -> None:
    for following, held in ((8.0, 1 / 9), (0.0, 1.0), (1e30, 1e-30)):
        steps = torch.tensor(41, device=device)
        lam, share, given = numbers(device, 9.0, 0.25, following)
        torch.ops.lsoftmax.anneal_(steps, lam, share, None, None, 3, -1.0, 0.9)
        assert float(share) == 0.25
        torch.ops.lsoftmax.anneal_(steps, lam, share, given, None, 3, -1.0, 0.9)
        assert float(share) == pytest.approx(held, rel=3e-7)


def test_a_step_counts_as_a_change_in_place() -> None:
    """So that autograd notices where lam was kept for a backward pass."""
    head = lsoftmax.LSoftmaxLoss(4, 3)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    factor = torch.ones((), requires_grad=True)
    product = factor * head.lam
    head(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_opcheck_of_annealing(device: str) -> None:
    steps = torch.tensor(3, device=device)
    lam, share, following, cosine = numbers(device, 9.0, 0.25, 8.0, 0.5)
    ops = torch.ops.lsoftmax
    torch.library.opcheck(ops.upcoming_lam.default, (steps, share, 1000.0, 1.0, 2.0, 0.5, 0.001))
    for given in ((following, cosine), (None, cosine), (following, None)):
        torch.library.opcheck(ops.anneal_.default, (steps, lam, share, *given, 4, 0.6, 0.9))


def test_sanitizer_smoke_of_annealing(device: str) -> None:
    """A training step of the layer: see test_loss.py's."""
    head = lsoftmax.LSoftmaxLoss(7, 10).to(device)
    x, y = torch.randn(3, 7, device=device), torch.tensor([1, -100, 9], device=device)
    head(x, y).backward()
    assert head.schedule.steps == 1
