"""Arguments of the loss and of the logits, drawn by hypothesis: what the property tests run on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from lsoftmax import functional
from lsoftmax import plan as planning

# Largest N, D and C, by what runs them: an emulated GPU takes a thousand times as long.
SIZES = {
    "portable": (60, 40, 400),
    "cuda": (300, 600, 9000),
    "emulation": (9, 20, 60),
    "sanitized": (6, 20, 40),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "misaligned", "expanded", "every other")
WAYS = ("kept", "classes", "rows")
# Decimal exponents of |x| and |w|. (2m - 1) |x| |w| and m^2 |x| / |w|, which backward keeps, stay
# inside the range of float32; in 16 bits so do gradients.
EXPONENTS = {
    torch.float64: (-80.0, 80.0),
    torch.float32: (-18.0, 16.0),
    torch.bfloat16: (-18.0, 16.0),
    torch.float16: (-5.0, 1.5),
}


@dataclass(frozen=True)
class Case:
    """A problem in few words, so that a failing one can be read; ``build`` makes the tensors."""

    seed: int  # of all numbers
    shape: tuple[int, int, int]
    dtype: torch.dtype
    layouts: tuple[str, str, str]  # of x, W and y
    norms: tuple[float, float]  # decimal exponents
    angles: str
    margin: int
    lam: float
    lam_is_tensor: bool

    def build(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D), W (C, D) and y (N,), leaves in their layouts."""
        n, d, c = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        wide = {"generator": generator, "dtype": torch.float64}
        a, b = (10.0**exponent for exponent in self.norms)
        # Norms differ from row to row by up to ten times.
        w = torch.nn.functional.normalize(torch.randn(c, d, **wide), dim=1)
        w *= b * 10.0 ** -torch.rand(c, 1, **wide)
        y = torch.randint(c, (n,), generator=generator)
        x = torch.nn.functional.normalize(torch.randn(n, d, **wide), dim=1)
        own = torch.nn.functional.normalize(w[y] / b, dim=1)
        if self.angles in ("near", "opposite"):
            x = x * 10.0 ** -(6 * torch.rand(n, 1, **wide)) + (
                own if self.angles == "near" else -own
            )
        elif self.angles == "across":
            x = x - (x * own).sum(1, keepdim=True) * own
        x *= a * 10.0 ** -torch.rand(n, 1, **wide)
        if self.angles == "zeros":
            x[::2], w[1::3] = 0.0, 0.0
        x, w = (
            placed(t.to(self.dtype).to(device), layout)
            for t, layout in zip((x, w), self.layouts, strict=False)
        )
        return x.requires_grad_(), w.requires_grad_(), placed(y.to(device), self.layouts[2])

    def lam_argument(self, device: str) -> float | Tensor:
        return torch.tensor(self.lam, device=device) if self.lam_is_tensor else self.lam


def placed(values: Tensor, layout: str) -> Tensor:
    """The values in memory another way; "expanded" repeats the first row."""
    if layout == "transposed" and values.dim() == 2:
        return values.t().contiguous().t()
    if layout == "sliced" and values.dim() == 2:
        wide = values.new_zeros(values.shape[0] + 2, values.shape[1] + 3)
        wide[1:-1, 2:-1] = values
        return wide[1:-1, 2:-1]
    if layout == "misaligned":
        room = values.new_zeros(values.numel() + 1)
        room[1:] = values.reshape(-1)
        return room[1:].view(values.shape)
    if layout == "expanded" and values.shape[0] > 0:
        return values[:1].clone().expand(values.shape)
    if layout == "every other":
        return torch.stack((values, values.flip(0)), dim=-1)[..., 0]
    return values


@st.composite
def sizes(draw: st.DrawFn, largest: int, least: int) -> int:
    """Mostly small, and the least, one and the largest more often than others."""
    edge = st.sampled_from((least, 1, 2, 8, largest))
    return min(largest, draw(edge | st.integers(least, largest)))


@st.composite
def cases(draw: st.DrawFn, backend: str) -> Case:
    n, d, c = SIZES[backend]
    dtype = draw(st.sampled_from(DTYPES))
    margin = draw(st.integers(1, 12) | st.just(4))
    low, high = EXPONENTS[dtype]
    ordinary = st.tuples(st.floats(-1, 1.3), st.just(0.0))
    norms = draw(ordinary | st.tuples(*[st.floats(low, high)] * 2))
    return Case(
        seed=draw(st.integers(0, 2**32 - 1)),
        shape=(draw(sizes(n, 0)), draw(sizes(d, 1)), draw(sizes(c, 1))),
        dtype=dtype,
        layouts=draw(st.tuples(*[st.just("contiguous") | st.sampled_from(LAYOUTS)] * 3)),
        norms=norms,
        angles=draw(st.sampled_from(("any", "near", "opposite", "across", "zeros"))),
        margin=margin,
        lam=draw(st.sampled_from((0.0, 0.5, 1e-30, 1e-4, 5.0, 1e3, 1e12, 3e38))),
        lam_is_tensor=draw(st.booleans()),
    )


@dataclass(frozen=True)
class LossOptions:
    """What else ``lsoftmax_loss`` takes."""

    reduction: str
    ignored: str  # which targets: "none", "some", "all", "class": the ignored index is a class
    weighted: str  # class weights: "none", "some" (one of them 0), "float64"
    label_smoothing: float
    way: str
    chunk: int

    def build(self, case: Case, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The targets, and keyword arguments; the budget is :func:`on_the_way`'s."""
        generator = torch.Generator().manual_seed(case.seed)
        c = case.shape[2]
        ignore_index = {"class": c - 1, "all": -1}.get(self.ignored, -100)
        if self.ignored == "some":
            y = torch.where(torch.rand(y.shape, generator=generator).to(y.device) < 0.4, -100, y)
        if self.ignored == "all":
            y = torch.full_like(y, -1)
        weight = None
        if self.weighted != "none":
            weight = torch.rand(c, generator=generator) * 3
            weight[: 1 if c > 1 else 0] = 0.0
            weight = weight.to(y.device, torch.float64 if self.weighted == "float64" else None)
        options = {
            "reduction": self.reduction,
            "ignore_index": ignore_index,
            "weight": weight,
            "label_smoothing": self.label_smoothing,
        }
        return y, options


def loss_options() -> st.SearchStrategy[LossOptions]:
    return st.builds(
        LossOptions,
        reduction=st.sampled_from(("mean", "sum", "none")),
        ignored=st.sampled_from(("none", "none", "some", "all", "class")),
        weighted=st.sampled_from(("none", "some", "float64")),
        label_smoothing=st.sampled_from((0.0, 0.0, 0.1, 1.0)) | st.floats(1e-3, 1),
        way=st.sampled_from(WAYS),
        chunk=st.integers(1, 40),
    )


@contextmanager
def on_the_way(way: str, chunk: int, x: Tensor, w: Tensor, reduction: str) -> Iterator[int | None]:
    """Within, ``memory_budget=`` what this yields makes the loss go that way, where it can.

    Chunks of rows are taken however small they are: a GPU's are not below 2048.
    """
    if way == "kept":
        yield None
        return
    size = x.shape[0] if way == "classes" else w.shape[0]
    budget = max(1, chunk * size * planning._BYTES[x.dtype])
    if way == "rows":
        budget += planning.bytes_beside_rows(*x.shape, w.shape[0], x.dtype)
    with pytest.MonkeyPatch.context() as patch:
        rows = 1 if way == "rows" else math.inf
        patch.setattr(planning, "_LEAST_ROWS", {x.device.type: rows})
        plan = functional.plan(x, w, reduction, budget)
        assert plan.class_chunk == 0 or way == "classes" or reduction == "none"
        assert plan.row_chunk == 0 or way == "rows"
        yield budget
