"""Every implementation that is measured: ours in all its regimes, the reference, the peers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from lsoftmax import functional, reference
from lsoftmax import plan as planning
from lsoftmax.plan import Plan

from .floors import REGIMES
from .peers import (
    Compiled,
    CrossEntropy,
    CutCrossEntropy,
    Liger,
    LigerHopper,
    LinearCrossEntropy,
    MetricLearning,
    Published,
    Quack,
)
from .provider import Bound, Loss, Provider, UnsupportedError

UNLIMITED = 2**62  # bytes


class Function(Provider):
    """A provider that is a function of (x, w, y, margin, lam)."""

    profiled = True

    def __init__(self, name: str, loss: Loss, arrays: float) -> None:
        self.name, self.loss, self.arrays = name, loss, arrays


@contextmanager
def by_memory_alone() -> Iterator[None]:
    """Within, the budget alone decides on the regime: a CPU takes chunks of what would fit, too."""
    before = planning._KEPT_BY_MALLOC
    planning._KEPT_BY_MALLOC = sys.maxsize
    try:
        yield
    finally:
        planning._KEPT_BY_MALLOC = before


class Regime(Provider):
    """Ours, forced into one of its ways round the N x C logits by a memory budget."""

    profiled = True

    def __init__(self, regime: str) -> None:
        self.regime, self.name, self.arrays = regime, f"{OURS.name} ({regime})", OURS.arrays

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        budget = self.budget(x, w)
        loss = partial(functional.lsoftmax_loss, x, w, y, margin, lam, memory_budget=budget)
        return Bound(by_memory_alone()(loss), (x, w))

    @by_memory_alone()
    def budget(self, x: Tensor, w: Tensor) -> int:
        """The largest, in steps of a fifth, that leads to the regime in training."""
        x = x.detach().requires_grad_()
        most = whole(x, w)
        for budget in (UNLIMITED, *(int(most * 0.8**k) + 1 for k in range(1, 31))):
            if regime_of(functional.plan(x, w, memory_budget=budget)) == self.regime:
                return budget
        raise UnsupportedError(f"no memory budget leads to {self.regime} here")


class Budgeted(Provider):
    """Ours with so little memory for what is N x C that it must take chunks."""

    name, arrays, profiled = "ours (within 2 GiB)", 1, True
    bytes = 2 << 30

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        if functional.plan(x, w, memory_budget=self.bytes).bytes == whole(x, w):
            raise UnsupportedError("all of it fits")
        loss = partial(functional.lsoftmax_loss, x, w, y, margin, lam, memory_budget=self.bytes)
        return Bound(loss, (x, w))


SWITCH = "LSOFTMAX_FUSED_FORWARD"


@contextmanager
def forward_apart() -> Iterator[None]:
    """Within, Hopper too has product and row pass apart, in backward's chunks as well."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"  # by hand: mock.patch.dict takes as long as a small step
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


class BoundApart(Bound):
    evaluate = forward_apart()(Bound.evaluate)
    step = forward_apart()(Bound.step)


class Apart(Provider):
    """Ours with product and row pass apart, where Hopper has one kernel for them: bfloat16."""

    name, arrays, profiled = "ours (forward apart)", 3, True
    cuda_only = True
    types = ("bfloat16",)

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        if torch.cuda.get_device_capability(x.device) != (9, 0):
            raise UnsupportedError("needs compute capability 9.0")
        return BoundApart(partial(functional.lsoftmax_loss, x, w, y, margin, lam), (x, w))


def whole(x: Tensor, w: Tensor) -> int:
    """What all N x C take."""
    return functional.plan(x, w, memory_budget=UNLIMITED).bytes


def regime_of(plan: Plan) -> str:
    chunks = "class chunks" if plan.class_chunk else "row chunks"
    return chunks if plan.class_chunk or plan.row_chunk else "in budget"


class Products(Provider):
    """The three bare matrix products, in the type of the inputs: what to compare times with.

    `step` takes all three, `evaluate` the first alone.
    """

    name, limit, arrays, profiled = "matrix products alone", True, 1, True

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        return BoundProducts(partial(torch.mm, x.detach(), w.detach().t()), (x, w))


class BoundProducts(Bound):
    @torch.no_grad()
    def step(self, scale: float = 1.0) -> tuple[Tensor | None, ...]:
        x, w = self.leaves
        logits = self.loss()
        return logits.mm(w), logits.t().mm(x)


PRODUCTS = Products()
OURS = Function("ours", functional.lsoftmax_loss, arrays=2)
REFERENCE = Function("reference", reference.lsoftmax_loss, arrays=5)

PROVIDERS: list[Provider] = [
    PRODUCTS,
    OURS,  # as it chooses by itself
    *(Regime(regime) for regime in REGIMES),
    Budgeted(),
    Apart(),
    REFERENCE,
    Compiled(REFERENCE),
    Published(),
    MetricLearning(),
    CrossEntropy(),
    Compiled(CrossEntropy()),
    LinearCrossEntropy(),
    Liger(),
    LigerHopper(),
    CutCrossEntropy("cut-cross-entropy", exact=False),
    CutCrossEntropy("cut-cross-entropy, unfiltered", exact=True),
    Quack(),
]
