"""The fused loss where numbers get difficult: any angle and norm, certain rows, peaks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from cases import WAYS, on_the_way
from chunks import run
from lsoftmax import functional, reference
from problems import Problem, assert_right, problem, relative_error, with_peaks


def cornered(cos: float, a: float, b: float, dtype: torch.dtype, device: str) -> Problem:
    """Row 0 at a given cosine to its class vector, norms a and b, among ordinary rows."""
    p = problem(6, 8, 9, torch.float64, "cpu")
    w = F.normalize(p.w.detach()[p.y[0]], dim=0)
    across = torch.randn(8, dtype=torch.float64)
    across = F.normalize(across - (across @ w) * w, dim=0)
    x, weights = p.x.detach().clone(), p.w.detach().clone()
    x[0] = a * (cos * w + math.sqrt(max(0.0, 1 - cos * cos)) * across)
    weights[p.y[0]] = b * w
    x, weights = (t.to(dtype).to(device).requires_grad_() for t in (x, weights))
    return Problem(x, weights, p.y.to(device))


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_angle_and_norm_is_finite_and_right(
    margin: int, dtype: torch.dtype, device: str
) -> None:
    """Parallel, antiparallel, cos 0, every bucket edge; |x| and |w| zero, tiny, huge."""
    edges = [math.cos(j * math.pi / margin) for j in range(margin + 1)]
    norms = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e-20, 1.0), (1.0, 1e-20)]
    norms += [(1e4, 1.0), (1e-20, 1e4)]
    norms += [(1e-22, 1.0), (1.0, 1e-22)]  # whose squares float32 rounds to a digit or to 0
    for (a, b), cos in itertools.product(norms, {*edges, 0.0}):
        # Logits of 1e4 are known to 1e-3 in float32, and so is which of two is the larger.
        bound = 1e-9 if dtype == torch.float64 else 1e-2 if max(a, b) > 1 else 1e-5
        p = cornered(cos, a, b, dtype, device)
        options = {"margin": margin, "lam": 0.25, "reduction": "none"}
        ours, truth = p.loss(**options), p.true_loss(**options)
        for name, value, true in zip(("loss", "dx", "dw"), ours, truth, strict=True):
            assert torch.isfinite(value).all(), (name, a, b, cos)
            assert relative_error(value, true) < bound, (name, a, b, cos)


def test_zero_row_leaves_zero(device: str) -> None:
    """Where the angle is undefined the gradient is plain softmax's, not zero and not NaN."""
    p = cornered(0.5, 0.0, 1.0, torch.float64, device)
    _, dx, _ = p.loss(margin=4, reduction="sum")
    plain = F.cross_entropy(F.linear(p.x, p.w), p.y, reduction="sum")
    (theirs,) = torch.autograd.grad(plain, p.x)
    upstream = 0.5  # what Problem.loss sends into a scalar
    torch.testing.assert_close(dx[0], upstream * theirs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("log_p", [-5.0, -12.0, -20.7])
def test_nearly_certain_rows_keep_their_digits(
    log_p: float, dtype: torch.dtype, device: str
) -> None:
    """At 1 - p_y = 1e-9, lse - f and p - 1 in float32 are 0; loss and gradients must not be."""
    # Powers of two and one feature a class: every product is exact, the truth is known.
    c = 8
    w = torch.eye(c, dtype=torch.float64)
    x = torch.zeros(4, c, dtype=torch.float64)
    y = torch.arange(4)
    target = round((math.log(c - 1) - log_p) * 64) / 64
    x[torch.arange(4), y] = target
    p = Problem(*(t.to(dtype).to(device).requires_grad_() for t in (x, w)), y.to(device))
    options = {"margin": 3, "lam": 0.0, "reduction": "none"}
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    ours, truth = p.loss(**options), p.true_loss(**options)
    assert (truth[0] < 3 * math.exp(log_p)).all(), "the case is not the one meant"
    for value, true in zip(ours, truth, strict=True):
        assert relative_error(value, true) < bound


@pytest.mark.parametrize("d", [2, 64])
def test_features_on_their_class_vectors(d: int, device: str) -> None:
    """psi magnifies an error of the cosine by m^2, and alpha w_y and beta x nearly cancel."""
    for margin, _ in itertools.product((2, 4), range(12)):
        w = F.normalize(torch.randn(30, d, dtype=torch.float64), dim=1)
        w[0] *= 20  # f about 20, the others' logits about 1
        x = F.normalize(w[:1] / 20 + 1e-2 * torch.randn(1, d, dtype=torch.float64) / d**0.5, dim=1)
        x, w = (t.float().to(device).requires_grad_() for t in (x, w))
        p = Problem(x, w, torch.zeros(1, dtype=torch.int64, device=device))
        # alpha and beta are about m^2: float32 rounds each, its product and the sums, and the norms
        assert_right(p, 1e-5, 20 * margin**2 * 2**-24, margin=margin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peaks_anywhere_in_a_long_row(dtype: torch.dtype, device: str) -> None:
    """Logits far above all that a row's reference was chosen from, so that it must be raised.

    A block looks at 8192 logits first, and its thread t owns packs of 4 that are 2048 apart.
    """
    c, late = 12_001, 8600
    peaks = [
        {late: 60},  # one thread raises, the others follow at the end
        {late: 60, late + 2048: 130},  # the same thread twice: it rescales what it wrote
        {late: 60, late + 1000: 130},  # two threads, the second higher
        {late + 1000: 60, late: 130},
        {late: 60, late + 1: 130, late + 2: 20},  # in one pack
        {100: 60, late: 130},  # above a reference that is high already
        {c - 1: 130, late: 90},  # in the ragged tail
        {late: 35},  # near enough to stay
    ]
    p = with_peaks(peaks, 16, c, dtype, device)
    p.y[1], p.y[5] = late, late  # the peak itself may be the target
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for options in ({}, {"label_smoothing": 0.1}):
        options = {"margin": 4, "lam": 1.0, "reduction": "none", **options}
        ours, truth = p.loss(**options), p.true_loss(**options)
        for name, value, true in zip(("loss", "dx", "dw"), ours, truth, strict=True):
            assert relative_error(value, true) < bound, name
        for i in range(len(peaks)):  # every row by itself: a large one hides the others
            assert relative_error(ours[1][i], truth[1][i]) < bound, i


def test_rows_far_below_and_above_zero(device: str) -> None:
    """Logits around +-1000: only differences may matter."""
    p = problem(6, 4, 40, torch.float32, device)
    with torch.no_grad():
        p.x[:, 0], p.w[:, 0] = 100.0, 10.0
        p.x[3:, 0] = -100.0
    assert_right(p, 1e-5, 1e-4, margin=2, lam=1.0)


@pytest.mark.parametrize("margin", [2, 4, 10])
@pytest.mark.parametrize("classes", [500, 1100])
def test_float16_features_on_their_class_vectors(classes: int, margin: int, device: str) -> None:
    """There `alpha w_y` and `beta x` are m^2 times their sum: neither may be cut to 11 digits."""
    x = torch.randn(32, 32, device=device)
    x *= 4 / x.norm(dim=1, keepdim=True)
    w = torch.randn(classes, 32, device=device)
    w[:32] = x + 0.02 * 4 / 32**0.5 * torch.randn(32, 32, device=device)
    x, w = (matrix.half().requires_grad_() for matrix in (x, w))
    p = Problem(x, w, torch.arange(32, device=device))
    ours = run(p, ("rows", 32), margin=margin)  # gradients in float32
    for value, true in zip(ours[1:], p.true_loss(margin=margin, lam=0.0)[1:], strict=True):
        assert relative_error(value, true) < 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("others", [0, 1])
def test_certain_rows_beyond_what_a_float_counts(
    others: int, smoothing: float, device: str
) -> None:
    """Of a logit of 1e11 in float32 the reference is rounded by thousands, and exp(thousands) is
    not a number to divide by; where no other exponential is left nothing depends on it.
    """
    x = torch.full((8, 1), 10.0) * (1 + torch.arange(8).unsqueeze(1) / 7)
    w = torch.full((1 + others, 1), 1e10)
    w[1:] *= -1
    x, w = (t.to(device).requires_grad_() for t in (x, w))
    y = torch.zeros(8, dtype=torch.int64, device=device)
    loss = functional.lsoftmax_loss(x, w, y, 4, 0.3, label_smoothing=smoothing)
    loss.backward()
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    true = reference.lsoftmax_loss(x64, w64, y, 4, 0.3, label_smoothing=smoothing)
    true.backward()
    torch.testing.assert_close(loss.double(), true, rtol=1e-6, atol=0)
    # With a lone class both should be 0: to some roundings of their terms.
    for ours, true, terms in ((x, x64, w), (w, w64, x)):
        atol = 1e-6 * terms.detach().abs().mean().item()
        torch.testing.assert_close(ours.grad.double(), true.grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes_alike_beyond_what_a_float_counts(smoothing: float, way: str, device: str) -> None:
    """Where f is the other class's logit and both are 1e10, rounding by hundreds decides which is
    the likelier, and no type has exp(f - reference). Probabilities add up to 1 either way: with one
    feature and like classes nothing is left of dx, and what one class gets the other loses: but for
    chunks of classes, whose logits are computed twice and may be rounded once up and once down.
    """
    x = 10.0 ** (8 + 3 * torch.rand(64, 1))
    w = (5 + torch.rand(1, 1)).expand(2, 1)
    x, w = (t.to(device).requires_grad_() for t in (x, w))
    y = torch.zeros(64, dtype=torch.int64, device=device)
    with on_the_way(way, 1, x, w, "sum") as budget:
        loss = functional.lsoftmax_loss(
            x, w, y, 4, 0.0, label_smoothing=smoothing, reduction="sum", memory_budget=budget
        )
    dx, dw = torch.autograd.grad(loss, (x, w))
    most = x.detach().sum()
    assert loss <= 1e-6 * w[0] * most
    assert (dw.abs() <= (1 + 1e-4) * most).all()
    remainder = 1e-4 + (way == "classes")
    assert (dx.abs() <= remainder * w[0]).all()
    assert dw.sum().abs() <= remainder * most


def test_a_sum_of_many_is_not_lost_in_a_huge_gap(device: str) -> None:
    """The others' probabilities add up to 1 where f is 1e20 below them: log C is no more than 6."""
    x = torch.tensor([[-3.0, 1.0]], dtype=torch.float64, device=device).requires_grad_()
    w = torch.full((400, 2), 1e20, dtype=torch.float64, device=device).requires_grad_()
    y = torch.zeros(1, dtype=torch.int64, device=device)
    functional.lsoftmax_loss(x, w, y, 4, 0.5).backward()
    x64, w64 = (t.detach().clone().requires_grad_() for t in (x, w))
    reference.lsoftmax_loss(x64, w64, y, 4, 0.5).backward()
    torch.testing.assert_close(x.grad, x64.grad, rtol=1e-9, atol=0)
    torch.testing.assert_close(w.grad, w64.grad, rtol=1e-9, atol=0)
