"""What is easily lost: each of these tests was written for a fault that had been planted, and that
no other test saw.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from lsoftmax import functional, reference
from problems import Problem, assert_right, problem, relative_error


@pytest.mark.parametrize("log_p", [-20.7, -34.0])
def test_certain_rows_in_float64(log_p: float, device: str) -> None:
    """log(1 + e), or p - 1, is known to 1e-16 / e only: 1e-7 of a loss of 1e-9.

    The truth is torch's softplus of numbers that are exact: powers of two, one feature a class.
    """
    c = 8
    z = round((math.log(c - 1) - log_p) * 64) / 64
    x = (z * torch.eye(4, c, dtype=torch.float64)).to(device).requires_grad_()
    w = torch.eye(c, dtype=torch.float64, device=device, requires_grad=True)
    loss = functional.lsoftmax_loss(x, w, torch.arange(4, device=device), 3, reduction="none")
    gap = torch.tensor(math.log(c - 1) - z, dtype=torch.float64)
    assert relative_error(loss.detach().cpu(), F.softplus(gap).expand(4)) < 1e-12
    (dx,) = torch.autograd.grad(loss.sum(), x)
    # On its class vector psi = 1 with slope m^2, but along x it is the norm's: alpha + beta = 1.
    assert relative_error(dx.diagonal().cpu(), -torch.sigmoid(gap).expand(4)) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "c"), [(torch.float32, 6), (torch.float32, 1030), (torch.bfloat16, 6)], ids=str
)
def test_ignored_rows_may_hold_anything(dtype: torch.dtype, c: int, device: str) -> None:
    """Where the target's part is added to the products, too: in bfloat16, or of many classes."""
    for smoothing in (0.0, 0.3):
        p = problem(7, 4, c, dtype, device)
        p.y[2] = 3
        options = {"ignore_index": 3, "label_smoothing": smoothing, "margin": 2}
        expected = p.loss(**options)
        with torch.no_grad():
            p.x[2] = torch.tensor([math.nan, math.inf, 0, 1])
        for value, before in zip(p.loss(**options), expected, strict=True):
            torch.testing.assert_close(value, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_margin_logits_of_16_bits_are_rounded_once(dtype: torch.dtype, device: str) -> None:
    """Rounded before psi, which magnifies an error of the cosine by up to m^2, they would be off
    by many units in the last place.
    """
    p = problem(40, 64, 10, dtype, device, norm=20.0)
    with torch.no_grad():  # 10 to 50 degrees from their class vectors: psi is steep there
        across = torch.linspace(0.02, 0.15, 40)[:, None] * torch.randn(40, 64)
        p.x.copy_(F.normalize(p.w[p.y].float() + across.to(device)) * 20)
    x, w = p.x.detach().double(), p.w.detach().double()
    norms = (x.norm(dim=1) * w[p.y].norm(dim=1)).unsqueeze(1)
    for margin, lam in itertools.product((2, 4), (0.0, 0.5)):
        ours = functional.lsoftmax_linear(p.x, p.w, p.y, margin, lam)
        truth = reference.lsoftmax_linear(x, w, p.y, margin, lam)
        ours, truth = (t.detach().double().gather(1, p.y[:, None]) for t in (ours, truth))
        rounding = torch.finfo(dtype).eps / 2 * truth.abs()
        before = torch.finfo(torch.float32).eps / 2 * margin**2 * norms  # where truth is near 0
        assert ((ours - truth).abs() <= rounding + before).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_formed_in_forward_are_scaled(dtype: torch.dtype, device: str) -> None:
    """In chunks of rows, where backward has but the upstream gradient to apply, and that not to
    what it has saved: so a second one is right as well.
    """
    p = problem(600, 8, 500, dtype, device)
    budget = (300 * 500 + (600 + 500) * 8) * dtype.itemsize
    if device == "cpu":  # fewer rows than pay for themselves on a GPU
        assert functional.plan(p.x, p.w, memory_budget=budget).row_chunk == 300
    loss = functional.lsoftmax_loss(p.x, p.w, p.y, 3, 0.5, memory_budget=budget)
    _, *truth = p.true_loss(margin=3, lam=0.5)  # of an upstream gradient of 0.5
    for factor in (1, 4):
        upstream = torch.tensor(0.5 * factor, dtype=loss.dtype, device=device)
        gradients = torch.autograd.grad(loss, (p.x, p.w), upstream, retain_graph=True)
        for gradient, true in zip(gradients, truth, strict=True):
            assert relative_error(gradient, factor * true) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batches_of_upstream_gradients(dtype: torch.dtype, device: str) -> None:
    """Red if what rounds 16-bit gradients formed in forward has no rule for vmap: each is that of
    an upstream gradient alone, which is rounded once.
    """
    p = problem(600, 8, 500, dtype, device)
    plan = functional.plan(p.x, p.w, memory_budget=900_000)
    loss = functional.lsoftmax_loss(p.x, p.w, p.y, 3, 0.5, memory_budget=900_000)
    if device == "cpu":
        assert plan.row_chunk
    upstream = torch.tensor([0.3, 1.0, -7.0], device=device)
    several = torch.autograd.grad(
        loss, (p.x, p.w), upstream, retain_graph=True, is_grads_batched=True
    )
    for one in range(3):
        alone = torch.autograd.grad(loss, (p.x, p.w), upstream[one], retain_graph=True)
        for batch, gradient in zip(several, alone, strict=True):
            assert torch.equal(batch[one], gradient)


def test_smoothing_of_long_features(device: str) -> None:
    """More features, and rows, than a warp has lanes: the constant part is summed by a block."""
    options = {"margin": 2, "lam": 0.5, "label_smoothing": 0.2}
    for n, d in ((40, 300), (300, 40)):
        assert_right(problem(n, d, 9, torch.float64, device), 1e-12, 1e-12, **options)


def test_smoothing_with_the_fused_forward_switched_on(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sums no logits: with smoothing the switch must change nothing."""
    p = problem(20, 64, 37, torch.bfloat16, device)
    options = {"margin": 2, "lam": 0.5, "label_smoothing": 0.2}
    apart = p.loss(**options)
    monkeypatch.setenv("LSOFTMAX_FUSED_FORWARD", "1")
    for value, expected in zip(p.loss(**options), apart, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_logits_a_thousand_apart(reduction: str, device: str) -> None:
    """The loss is the distance itself, and no exponential of it is finite."""
    w = torch.eye(3, dtype=torch.float64, device=device)
    x = torch.tensor([[0.5, 1e3, 0.0], [1e3, 0.5, 0.0]], dtype=torch.float64, device=device)
    y = torch.zeros(2, dtype=torch.int64, device=device)
    p = Problem(x.requires_grad_(), w.requires_grad_(), y)
    options = {"margin": 1, "reduction": reduction}
    for value, true in zip(p.loss(**options), p.true_loss(**options), strict=True):
        assert torch.isfinite(value).all()
        assert relative_error(value, true) < 1e-12
