"""Any shape, type, layout, margin, option and way, against float64: cases that hypothesis draws.

The cases of a run are those of its ``--seed``; a failing one is printed, made as small as it gets.
``make test-nightly`` runs many times as many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from bounds import assert_within, linear_bounds, loss_bounds
from cases import Case, LossOptions, cases, loss_options, on_the_way
from conftest import hash_of
from lsoftmax import functional, reference

# Cases of each test, by what runs them: in the ordinary test command, and nightly.
COUNTS = {
    "portable": (150, 2500),
    "cuda": (150, 2500),
    "emulation": (50, 600),
    "sanitized": (15, 200),
}
FROZEN = st.sampled_from(("neither", "neither", "x", "w"))

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize(
        "nightly",
        [False, pytest.param(True, marks=pytest.mark.nightly)],
        ids=["ordinary", "nightly"],
    ),
]


@pytest.fixture
def drawn(request: pytest.FixtureRequest, backend: str, nightly: bool) -> Callable[..., Any]:
    """``drawn(name=strategy)(check)`` runs the check on as many cases as are asked for."""

    def run(**strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], None]:
        def begin(check: Callable[..., None]) -> None:
            # To make a case smaller may take five minutes: on a GPU all tests have four.
            phases = [p for p in Phase if backend != "cuda" or p is not Phase.shrink]
            rules = settings(
                phases=phases,
                max_examples=COUNTS[backend][nightly],
                deadline=None,
                derandomize=False,
                database=None,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            )
            start = hash_of(f"{request.config.getoption('--seed')} {request.node.name}")
            seed(start)(rules(given(**strategies)(check)))()

        return begin

    return run


def gradients(out: Tensor, x: Tensor, w: Tensor, upstream: Tensor) -> list[Tensor | None]:
    """Of ``x`` and ``w``; None for one that is frozen."""
    wanted = [t for t in (x, w) if t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, upstream.to(out.dtype)) if wanted else ())
    return [next(found) if t.requires_grad else None for t in (x, w)]


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def test_loss(device: str, backend: str, drawn: Callable) -> None:
    @drawn(case=cases(backend), options=loss_options(), frozen=FROZEN)
    def check(case: Case, options: LossOptions, frozen: str) -> None:
        x, w, y = case.build(device)
        y, keywords = options.build(case, y)
        before = [t.detach().clone() for t in (x, w, y)]
        for name, tensor in (("x", x), ("w", w)):
            tensor.requires_grad_(frozen != name)
        lam = case.lam_argument(device)
        with on_the_way(options.way, options.chunk, x, w, options.reduction) as budget:
            loss = functional.lsoftmax_loss(
                x, w, y, case.margin, lam, memory_budget=budget, **keywords
            )
        assert loss.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        assert loss.shape == (y.shape if options.reduction == "none" else ())
        upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), device=device)[: loss.numel()]
        upstream = upstream.reshape(loss.shape)
        ours = gradients(loss, x, w, upstream)
        assert all(map(torch.equal, before, (x, w, y))), "an input was changed"

        x64, w64 = wide(x, w)
        true = reference.lsoftmax_loss(x64, w64, y, case.margin, lam, **keywords)
        kept = y != keywords["ignore_index"]
        divisor = torch.ones((), dtype=torch.float64, device=device)
        if options.reduction == "mean":
            weights = (
                torch.ones(case.shape[2]) if keywords["weight"] is None else keywords["weight"]
            )
            divisor = weights.to(device).double()[y[kept]].sum()
        if (
            divisor == 0
        ):  # NaN, or with smoothing Inf: the loss has a share of other classes' weights
            assert not loss.isfinite()
            if not kept.any():
                assert all(g is None or not g.any() for g in ours)
            return
        bounds = loss_bounds(
            x64.detach(),
            w64.detach(),
            y,
            upstream.double().expand(y.shape) / divisor,
            case.dtype,
            margin=case.margin,
            lam=float(torch.tensor(case.lam)),
            weight=keywords["weight"],
            ignore_index=keywords["ignore_index"],
            label_smoothing=options.label_smoothing,
            remade=options.way == "classes",
        )
        out = bounds.out if options.reduction == "none" else bounds.out.sum() / divisor
        assert_within(loss.detach(), true.detach(), out, "loss")
        truths = torch.autograd.grad(true, (x64, w64), upstream.double())
        for name, value, truth, tensor, bound in zip(
            ("dx", "dw"), ours, truths, (x, w), (bounds.dx, bounds.dw), strict=True
        ):
            if value is not None:
                assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
                assert_within(value, truth, bound, name)


def test_linear(device: str, backend: str, drawn: Callable) -> None:
    @drawn(case=cases(backend), frozen=FROZEN)
    def check(case: Case, frozen: str) -> None:
        x, w, y = case.build(device)
        for name, tensor in (("x", x), ("w", w)):
            tensor.requires_grad_(frozen != name)
        lam = case.lam_argument(device)
        logits = functional.lsoftmax_linear(x, w, y, case.margin, lam)
        assert logits.dtype == case.dtype
        generator = torch.Generator().manual_seed(case.seed)
        upstream = torch.randn(logits.shape, generator=generator).to(case.dtype).to(device)
        ours = gradients(logits, x, w, upstream)

        x64, w64 = wide(x, w)
        true = reference.lsoftmax_linear(x64, w64, y, case.margin, lam)
        truths = torch.autograd.grad(true, (x64, w64), upstream.double())
        bounds = linear_bounds(
            x64.detach(),
            w64.detach(),
            y,
            upstream.double(),
            case.dtype,
            margin=case.margin,
            lam=float(torch.tensor(case.lam)),
        )
        assert_within(logits.detach(), true.detach(), bounds.out, "logits")
        for name, value, truth, tensor, bound in zip(
            ("dx", "dw"), ours, truths, (x, w), (bounds.dx, bounds.dw), strict=True
        ):
            if value is not None:
                assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
                assert_within(value, truth, bound, name)
