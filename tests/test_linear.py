"""The margin logits and their gradients, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from lsoftmax import functional
from problems import problem, relative_error


def others(y: torch.Tensor, c: int) -> torch.Tensor:
    mask = torch.ones(len(y), c, dtype=torch.bool, device=y.device)
    return mask.scatter_(1, y[:, None], False)


@pytest.mark.parametrize(
    ("n", "d", "c"), [*itertools.product((1, 33), (1, 7, 513), (1, 10, 1001)), (150, 64, 3)]
)
def test_every_size_and_type(n: int, d: int, c: int, device: str) -> None:
    """150 rows of 3 classes: sums of many shares, over more rows than a block has threads."""
    bounds = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        if min(n, d) == 1:  # a gradient of one number: a sum that may cancel to a few digits
            bound *= 1000
        p = problem(n, d, c, dtype, device)
        upstream = torch.randn(n, c).to(dtype).to(device)
        ours = p.logits(upstream, margin=4, lam=0.5)
        truth = p.true_logits(upstream, margin=4, lam=0.5)
        for name, value, true in zip(("logits", "dx", "dw"), ours, truth, strict=True):
            assert value.dtype == dtype
            assert relative_error(value, true) <= bound, (name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lam", [0.0, 5.0])
def test_other_logits_are_bit_for_bit_plain(dtype: torch.dtype, lam: float, device: str) -> None:
    """Some published layers scale them with lam as well."""
    p = problem(17, 24, 40, dtype, device)
    logits = functional.lsoftmax_linear(p.x, p.w, p.y, 3, lam)
    mask = others(p.y, 40)
    assert torch.equal(logits[mask], (p.x @ p.w.t())[mask])
    assert not torch.equal(logits, p.x @ p.w.t())


def test_with_cross_entropy_it_is_the_fused_loss(device: str) -> None:
    p = problem(20, 12, 30, torch.float64, device)
    loss = F.cross_entropy(functional.lsoftmax_linear(p.x, p.w, p.y, 4, 0.3), p.y)
    apart = torch.autograd.grad(loss, (p.x, p.w))
    fused = functional.lsoftmax_loss(p.x, p.w, p.y, 4, 0.3)
    torch.testing.assert_close(fused, loss)
    for a, b in zip(apart, torch.autograd.grad(fused, (p.x, p.w)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck(device: str) -> None:
    p = problem(5, 3, 6, torch.float64, device)

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.lsoftmax_linear(x, w, p.y, 3, 0.4)

    assert torch.autograd.gradcheck(run, (p.x, p.w), nondet_tol=0.0)


def test_upstream_gradient_is_not_changed(device: str) -> None:
    p = problem(6, 5, 8, torch.float32, device)
    logits = functional.lsoftmax_linear(p.x, p.w, p.y, 4)
    upstream = torch.randn(6, 8).to(device)
    kept = upstream.clone()
    first = torch.autograd.grad(logits, (p.x, p.w), upstream, retain_graph=True)
    second = torch.autograd.grad(logits, (p.x, p.w), upstream)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shapes(device: str) -> None:
    p = problem(3, 5, 8, torch.float32, device)
    assert functional.lsoftmax_linear(p.x[0], p.w, p.y[0]).shape == (8,)
    assert functional.lsoftmax_linear(p.x[:0], p.w, p.y[:0]).shape == (0, 8)
    expanded = functional.lsoftmax_linear(p.x, p.w, p.y)
    (dx,) = torch.autograd.grad(expanded.sum(), p.x)  # the gradient arrives expanded: stride 0
    assert dx.shape == p.x.shape


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_frozen_inputs(frozen: str, device: str) -> None:
    p = problem(9, 7, 12, torch.float32, device)
    upstream = torch.randn(9, 12).to(device)
    _, dx, dw = p.logits(upstream)
    getattr(p, frozen).requires_grad_(False)
    wanted, expected = (p.w, dw) if frozen == "x" else (p.x, dx)
    logits = functional.lsoftmax_linear(p.x, p.w, p.y)
    assert torch.equal(torch.autograd.grad(logits, wanted, upstream)[0], expected)
