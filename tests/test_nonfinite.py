"""NaN and Inf in features or class vectors: who sees them and who does not, whatever the way.

With z_ij = x_i . w_j, a logit is made of x_i and w_j and of nothing else. So:

- What is not finite in x_i shows in row i, in its loss and in dX_i; and in all of dW, since every
  class has a share of every row. Other rows' losses and gradients are the same bits as without;
  in plain torch on a CPU they may lose that in the last bit, for there one such row makes the whole
  batch's norms be taken in float64.
- A NaN in w_j is in the denominator of every row: all losses, all of dX and all of dW are NaN. With
  Inf in w_j a logit is +-Inf or NaN. The classes of -Inf have the probability 0, and where they are
  not the target the loss is that of the other classes; the rest is not finite. dX is NaN in every
  row, if only from 0 * Inf.
- A row that is ignored has a loss of 0 and a gradient of 0, whatever is in it, and shows nowhere.
  What is not finite in W makes its gradient NaN, as it does F.linear's: 0 * Inf again.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chunks import IN_BUDGET, run
from lsoftmax import functional
from problems import Problem, problem
from test_loss import FLOATS

N, D, C = 7, 12, 29
WAYS = [IN_BUDGET, ("classes", 8), ("rows", 3)]
BAD = (math.nan, math.inf, -math.inf)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]}{way[1]}"),
    pytest.mark.parametrize("dtype", FLOATS, ids=str),
]


def poisoned(p: Problem, name: str, row: int, value: float, whole: bool) -> Problem:
    """A copy with ``value`` in one element, or in all, of a row of x or w."""
    tensors = {key: getattr(p, key).detach().clone() for key in ("x", "w")}
    tensors[name][row, slice(None) if whole else slice(3, 4)] = value
    return Problem(*(t.requires_grad_() for t in tensors.values()), p.y)


def outcome(p: Problem, way: tuple[str, int], **options) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dX and dW; the loss of each row, but where the way has only one number."""
    reduction = "sum" if way[0] == "rows" else "none"
    return run(p, way, reduction=reduction, margin=3, lam=0.5, **options)


def assert_same(value: Tensor, before: Tensor, backend: str) -> None:
    if backend == "portable":
        torch.testing.assert_close(value, before)
    else:
        assert torch.equal(value, before)


def shown(gradient: Tensor) -> list[bool]:
    """Which rows are not finite."""
    return (~gradient.isfinite()).any(1).tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_in_a_feature(
    smoothing: float, dtype: torch.dtype, way: tuple[str, int], device: str, backend: str
) -> None:
    for bad, bad_row, whole in zip(BAD, (2, 0, N - 1), (False, True, False), strict=True):
        p = problem(N, D, C, dtype, device)
        clean = outcome(p, way, label_smoothing=smoothing)
        poison = poisoned(p, "x", bad_row, bad, whole)
        loss, dx, dw = outcome(poison, way, label_smoothing=smoothing)
        others = [i for i in range(N) if i != bad_row]
        assert shown(dx) == [i == bad_row for i in range(N)]
        assert_same(dx[others], clean[1][others], backend)
        assert all(shown(dw))
        if loss.dim() == 0:
            assert not loss.isfinite()
        else:
            assert not loss[bad_row].isfinite()
            assert_same(loss[others], clean[0][others], backend)


def test_nan_in_a_class_vector(
    dtype: torch.dtype, way: tuple[str, int], device: str, backend: str
) -> None:
    for j in (0, 17, C - 1):
        p = problem(N, D, C, dtype, device)
        p.y[0], p.y[1:] = j, (j + 1) % C
        for value in outcome(poisoned(p, "w", j, math.nan, whole=False), way):
            assert value.isnan().reshape(value.shape[0] if value.dim() else 1, -1).any(1).all()


def test_infinity_in_a_class_vector(dtype: torch.dtype, way: tuple[str, int], device: str) -> None:
    """Row 0 has a logit of -Inf for class 17, row 1 of Inf, row 2 as its target's."""
    p = problem(N, D, C, dtype, device)
    with torch.no_grad():
        p.x[:, 3] = -p.x[:, 3].abs() - 0.1
        p.x[1, 3] *= -1
    p.y[:] = 4
    p.y[2] = 17
    loss, dx, _ = outcome(poisoned(p, "w", 17, math.inf, whole=False), way)
    assert all(dx.isnan().any(1)), "0 * Inf"
    if loss.dim() == 0:
        assert not loss.isfinite()
        return
    assert not loss[1].isfinite()
    assert not loss[2].isfinite()
    rest = [i for i in range(N) if i not in (1, 2)]
    without = Problem(p.x, torch.cat((p.w[:17], p.w[18:])), p.y)
    expected = without.true_loss(reduction="none", margin=3, lam=0.5)[0][rest]
    torch.testing.assert_close(loss[rest].double(), expected, rtol=1e-5, atol=1e-6)


def test_ignored_rows_see_and_show_nothing(
    dtype: torch.dtype, way: tuple[str, int], device: str, backend: str
) -> None:
    for bad in BAD:
        p = problem(N, D, C, dtype, device)
        p.y[[1, 4]] = -100
        clean = outcome(p, way)
        for value, before in zip(
            outcome(poisoned(p, "x", 4, bad, whole=True), way), clean, strict=True
        ):
            assert_same(value, before, backend)
        loss = outcome(poisoned(p, "w", 5, math.nan, whole=True), way)[0]
        assert loss.dim() == 0 or not loss[[1, 4]].any()


def test_of_the_margin_logits(
    dtype: torch.dtype, way: tuple[str, int], device: str, backend: str
) -> None:
    """Row i of x is in row i of the logits, w_j in column j; nothing else of either is changed."""
    if way != IN_BUDGET:
        pytest.skip("there is one way to the logits")
    p = problem(N, D, C, dtype, device)
    p.y[:] = 4
    clean = functional.lsoftmax_linear(p.x, p.w, p.y, 3)
    upstream = torch.randn(N, C, device=device).to(dtype)
    _, clean_dx, _ = p.logits(upstream, margin=3)
    for bad in BAD:
        logits, dx, _ = poisoned(p, "x", 2, bad, whole=True).logits(upstream, margin=3)
        others = [i for i in range(N) if i != 2]
        assert shown(logits) == shown(dx) == [i == 2 for i in range(N)]
        assert_same(logits[others], clean[others], backend)
        assert_same(dx[others], clean_dx[others], backend)
        for j in (4, 9):  # a target, and another
            logits = poisoned(p, "w", j, bad, whole=True).logits(upstream, margin=3)[0]
            assert shown(logits.t()) == [i == j for i in range(C)]
            rest = [i for i in range(C) if i != j]
            assert_same(logits[:, rest], clean[:, rest], backend)
