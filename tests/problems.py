"""Random inputs, and the float64 truth about them, for the tests of both ops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsoftmax import functional, reference


@dataclass
class Problem:
    """Features (N, D), weights (C, D) and targets (N,), with gradients wanted."""

    x: Tensor
    w: Tensor
    y: Tensor

    def loss(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The op's loss and gradients."""
        return self._run(functional.lsoftmax_loss, self.x, self.w, **options)

    def true_loss(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradients of the reference in float64, from the same inputs."""
        return self._run(reference.lsoftmax_loss, *self._wide(), **options)

    def logits(self, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._run(functional.lsoftmax_linear, self.x, self.w, upstream, **options)

    def true_logits(self, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._run(reference.lsoftmax_linear, *self._wide(), upstream, **options)

    def _wide(self) -> tuple[Tensor, Tensor]:
        x, w = self.x.detach().double(), self.w.detach().double()
        return x.requires_grad_(), w.requires_grad_()

    def _run(
        self, function: Any, x: Tensor, w: Tensor, upstream: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = function(x, w, self.y, **options)
        if upstream is None:  # different for every row, where there is a gradient per row
            upstream = torch.linspace(0.5, 1.5, max(out.numel(), 1), device=out.device)
            upstream = upstream[: out.numel()].reshape(out.shape)
        dx, dw = torch.autograd.grad(out, (x, w), upstream.to(out.dtype))
        return out.detach(), dx, dw


def problem(
    n: int,
    d: int,
    c: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    norm: float = 4.0,
) -> Problem:
    """Features of norm about ``norm`` and unit class vectors, so that logits are of that size."""
    x = (torch.randn(n, d) * norm / d**0.5).to(dtype).to(device).requires_grad_()
    w = (torch.randn(c, d) / d**0.5).to(dtype).to(device).requires_grad_()
    return Problem(x, w, torch.randint(c, (n,)).to(device))


def with_peaks(
    peaks: list[dict[int, float]], d: int, c: int, dtype: torch.dtype, device: str
) -> Problem:
    """A row for each of ``peaks``, which has these logits at these classes and small others; all
    with target 17.
    """
    n = len(peaks)
    p = problem(n, d, c, dtype, device)
    with torch.no_grad():
        p.x.zero_()
        p.x[:, :n] = torch.eye(n)  # a column of W a row
        for i, row in enumerate(peaks):
            for place, size in row.items():
                p.w[place, i] = size
        p.y.fill_(17)
    return p


def nearest(features: Tensor, head: nn.Module) -> Tensor:
    """Targets (N,): of each row the layer's class vector at the smallest angle.

    With random ones the features' mean cosine less its deviation is below 0, which counts as 0 in
    whatever annealing makes of it: a test would compare 0 with 0.
    """
    weight = getattr(head, "linear", head).weight.detach().double()
    features = features.detach().double()
    return (F.normalize(features, dim=1) @ F.normalize(weight, dim=1).T).argmax(1)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, Euclidean; 0 for two zeros, NaN never passes a bound."""
    difference = (value.double() - truth.double()).norm()
    scale = truth.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def assert_right(p: Problem, loss_bound: float, gradient_bound: float, **options) -> None:
    ours, truth = p.loss(**options), p.true_loss(**options)
    assert ours[0].dtype == (torch.float64 if p.x.dtype == torch.float64 else torch.float32)
    assert ours[0].shape == truth[0].shape
    assert (ours[1].dtype, ours[2].dtype) == (p.x.dtype, p.w.dtype)
    bounds = (loss_bound, gradient_bound, gradient_bound)
    for name, value, true, bound in zip(("loss", "dx", "dw"), ours, truth, bounds, strict=True):
        assert relative_error(value, true) <= bound, name


def rounding_error(p: Problem, dtype: torch.dtype, **options) -> float:
    """Error of an implementation with float32 sums: exponentials are rounded, features times their
    scale, and the gradients.

    In quadrature, each taken as what rounding the true gradients costs; but the exponentials are
    larger than what label smoothing's 1/C leaves of them.
    """
    _, dx, dw = p.true_loss(**options)
    margin, lam = options.get("margin", 4), options.get("lam", 0.0)
    logits = reference.lsoftmax_linear(*p._wide(), p.y.clamp(min=0), margin, lam).detach()
    probabilities = logits.softmax(1)
    left = probabilities - options.get("label_smoothing", 0.0) / probabilities.shape[1]
    times = float(probabilities.norm() / left.norm())
    return math.hypot(1, times, times) * max(relative_error(g.to(dtype), g) for g in (dx, dw))
