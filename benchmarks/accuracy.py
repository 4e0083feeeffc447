"""The true loss and gradients in float64, at the measured shape and from the measured inputs.

Nothing of size N x C is held: classes go by in slices. The loss is exact over all rows; gradients
are compared for some rows of x and some rows of W, the first and last among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lsoftmax import reference

ROWS, OTHERS = 64, 64  # compared rows of dx; compared rows of dW that are nobody's target
SLICE_BYTES = 2**28

# Relative errors from which a result counts as wrong: the loss, gradients, and dW of the classes
# that are not a target, which are small and which 16-bit softmax values make coarse.
BOUNDS = {
    "float64": {"loss": 1e-9, "dx": 1e-8, "dw": 1e-8, "dw_others": 1e-8},
    "float32": {"loss": 1e-4, "dx": 1e-3, "dw": 1e-3, "dw_others": 1e-3},
    "float16": {"loss": 2e-2, "dx": 1e-1, "dw": 1e-1, "dw_others": 5e-1},
    "bfloat16": {"loss": 2e-2, "dx": 1e-1, "dw": 1e-1, "dw_others": 5e-1},
}


class Outputs(NamedTuple):
    """What a provider gave for the inputs of a case."""

    gradients: tuple[Tensor | None, ...]  # dx and dw of the loss times a scale
    losses: Sequence[Tensor]  # 0-dim, of calls that should give the same
    transposed: bool = False  # dw is (D, C)


class Truth:
    """What any (margin, lam) gives for these inputs; all that has no margin is computed once."""

    @torch.no_grad()
    def __init__(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        (n, _), c = x.shape, w.shape[0]
        self.x, self.y = x.detach().double(), y
        self.w_target = w[y].double()
        self.rows = _spread(torch.arange(n, device=x.device), ROWS)
        is_target = torch.zeros(c, dtype=torch.bool, device=x.device)
        is_target[y] = True
        self.targets = y[self.rows].unique()
        self.others = _spread((~is_target).nonzero().squeeze(1), OTHERS)

        step = max(SLICE_BYTES // (8 * max(n, x.shape[1])), 1)
        slices = torch.arange(c, device=x.device).split(step)
        # L: log-sum-exp over the classes that are not the row's target.
        self.lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=x.device)
        for classes in slices:
            z = self._logits(w[classes].double(), classes, slice(None))
            self.lse = torch.logaddexp(self.lse, z.logsumexp(1))
        # The mean of those class vectors, each with its share of exp(L): what pushes a feature.
        self.push = torch.zeros_like(self.x[self.rows])
        for classes in slices:
            vectors = w[classes].double()
            self.push += self._shares(vectors, classes, self.rows) @ vectors
        compared = {"dw": self.targets, "dw_others": self.others}
        self.share = {name: self._shares(w[k].double(), k) for name, k in compared.items()}

    def results(self, margin: int, lam: float) -> dict[str, Tensor]:
        """The loss, dx of `rows`, dW of `targets` and of `others`."""
        x, w = self.x.clone().requires_grad_(), self.w_target.clone().requires_grad_()
        u, s = (x * w).sum(1), x.norm(dim=1) * w.norm(dim=1)
        f = (lam * u + s * reference.psi(u / s, margin)) / (1 + lam)
        f_x, f_w = torch.autograd.grad(f.sum(), (x, w))
        f, n = f.detach(), len(f)
        missing = torch.sigmoid(self.lse - f).unsqueeze(1) / n  # (1 - p_y) / N
        own = self.targets.unsqueeze(1) == self.y
        return {
            "loss": torch.nn.functional.softplus(self.lse - f).mean(),
            "dx": missing[self.rows] * (self.push - f_x[self.rows]),
            "dw": (self.share["dw"] * missing).t() @ self.x - own.double() @ (missing * f_w),
            "dw_others": (self.share["dw_others"] * missing).t() @ self.x,
        }

    def errors(self, outputs: Outputs, margin: int, lam: float, scale: float) -> dict:
        """Relative errors of what a provider gives; None for what it does not. Of several losses
        the worst.
        """
        truth = self.results(margin, lam)
        dx, dw = outputs.gradients
        if dw is not None and outputs.transposed:
            dw = dw.t()
        values = {
            "dx": dx if dx is None else dx[self.rows],
            "dw": dw if dw is None else dw[self.targets],
            "dw_others": dw if dw is None else dw[self.others],
        }
        errors = {
            name: None if value is None else _error(value.double() / scale, truth[name])
            for name, value in values.items()
        }
        losses = [loss.detach().double() for loss in outputs.losses]
        worst = None
        if losses:  # NaN, too, is the largest
            off = (torch.stack(losses) - truth["loss"]).abs().max()
            worst = float(off / truth["loss"].abs())
        return {"loss": worst, **errors}

    def _logits(self, vectors: Tensor, classes: Tensor, rows: Tensor | slice) -> Tensor:
        """x W' for some of the classes, -inf at the rows' own targets."""
        own = self.y[rows].unsqueeze(1) == classes
        return (self.x[rows] @ vectors.t()).masked_fill_(own, -torch.inf)

    def _shares(
        self, vectors: Tensor, classes: Tensor, rows: Tensor | slice = slice(None)
    ) -> Tensor:
        return (self._logits(vectors, classes, rows) - self.lse[rows].unsqueeze(1)).exp()


def wrong(errors: dict, dtype: str) -> str | None:
    """What is out of bounds, or None. NaN is."""
    out = [
        f"{name} off by {errors[name]:.1g} (bound {bound:g})"
        for name, bound in BOUNDS[dtype].items()
        if errors[name] is not None and not errors[name] <= bound
    ]
    return ", ".join(out) or None


def _error(value: Tensor, truth: Tensor) -> float:
    size = float(truth.norm())
    return float((value - truth).norm()) / (size or 1.0)


def _spread(items: Tensor, count: int) -> Tensor:
    """At most `count` of the items, evenly, from the first to the last."""
    if len(items) <= count:
        return items
    return items[torch.linspace(0, len(items) - 1, count, device=items.device).long()]
