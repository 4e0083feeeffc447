"""Chunks of classes and of rows where digits are easily lost: rows that are nearly certain, a
million classes, one class that dominates, and offsets beyond 2^31.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from chunks import IN_BUDGET, assert_close, bounds_for, run
from problems import Problem, problem, relative_error, with_peaks

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
EVERY_WAY = [IN_BUDGET, ("classes", 3), ("rows", 3)]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("log_p", [-5.0, -12.0, -20.7])
def test_nearly_certain_rows_keep_their_digits(
    log_p: float, dtype: torch.dtype, device: str
) -> None:
    """At 1 - p_y = 1e-9, lse - f and p - 1 in float32 are 0; loss and gradients must not be."""
    # Powers of two and one feature a class: every product is exact, the truth is known.
    c = 8
    w = torch.eye(c, dtype=torch.float64)
    x = torch.zeros(c, c, dtype=torch.float64)
    y = torch.arange(c)
    x[y, y] = round((math.log(c - 1) - log_p) * 64) / 64
    p = Problem(*(t.to(dtype).to(device).requires_grad_() for t in (x, w)), y.to(device))
    for reduction, way in itertools.product(("sum", "none"), EVERY_WAY):
        if way[0] == "rows" and reduction == "none":
            continue
        scale = 2.0 ** round(-log_p / math.log(2)) if dtype == torch.float16 else 1.0
        ours = run(p, way, scale, margin=3, reduction=reduction)
        truth = p.true_loss(margin=3, reduction=reduction)
        assert (truth[0] < 3 * c * math.exp(log_p)).all(), "the case is not the one meant"
        assert_close(ours, truth, BOUNDS[dtype], BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_nearly_uniform_rows_of_a_million_classes(dtype: torch.dtype, device: str) -> None:
    """The loss is log C and a bit, each gradient of another class a millionth."""
    p = problem(2, 2, 1_000_000, dtype, device, norm=0.1)
    p.x.detach().abs_()  # the two rows' parts of dW do not cancel: what is left would be rounding
    bounds = bounds_for(p, reduction="sum")
    if dtype == torch.float16:  # of two rows, one of which may nearly cancel
        bounds = (bounds[0], max(bounds[1], 4e-3))
    truth = p.true_loss(reduction="sum")
    others = torch.ones(1_000_000, dtype=torch.bool, device=device)
    others[p.y] = False
    for way in (IN_BUDGET, ("classes", 300_000), ("rows", 1)):
        # Not 2^13: a target's part, m^2 = 16 times a class vector, would leave the range.
        ours = run(p, way, 2.0**11 if dtype == torch.float16 else 1.0, reduction="sum")
        assert_close(ours, truth, *bounds)
        # The targets' rows of dW hide the others'; of those, each is a product of two roundings.
        bound = bounds[1] if dtype == torch.float32 else 1e-2
        assert relative_error(ours[2][others], truth[2][others]) < bound


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_one_class_dominates(dtype: torch.dtype, device: str) -> None:
    """Logits far above all in earlier chunks, or in later ones: running sums are rescaled."""
    c = 40
    peaks = [
        {35: 60},  # in the last chunk, others first
        {2: 60},  # in the first chunk, others after
        {5: 60, 18: 130, 35: 90},  # up, and down again
        {17: 130},  # the target itself
        {17: 100, 3: 100, 36: 99},  # as large as the target, in chunks before and after
        {6: 1000},
    ]
    p = with_peaks(peaks, 8, c, dtype, device)
    for smoothing, way in itertools.product((0.0, 0.1), EVERY_WAY):
        options = {"margin": 4, "lam": 1.0, "reduction": "sum", "label_smoothing": smoothing}
        ours, truth = run(p, way, **options), p.true_loss(**options)
        assert_close(ours, truth, BOUNDS[dtype], BOUNDS[dtype])
        for i in range(len(peaks)):  # every row by itself: a large one hides the others
            assert relative_error(ours[1][i], truth[1][i]) < BOUNDS[dtype], (i, way)


def test_rows_far_below_zero(device: str) -> None:
    """All logits about -1000, and some -inf: only differences may matter."""
    p = problem(6, 4, 40, torch.float32, device)
    with torch.no_grad():
        p.x[:, 0], p.w[:, 0] = -100.0, 10.0
    truth = p.true_loss(margin=2, lam=1.0)
    for way in EVERY_WAY:
        assert_close(run(p, way, margin=2, lam=1.0), truth, 1e-5, 1e-4)
    with torch.no_grad():
        p.x[:, 0] = -1.0
        p.w[:8, 0] = math.inf  # whole chunks of logits of -inf
        p.y.fill_(20)
    losses = [run(p, way, margin=2, lam=1.0)[0] for way in (IN_BUDGET, ("classes", 4))]
    assert torch.isfinite(losses[0])
    torch.testing.assert_close(losses[1], losses[0])


def test_more_than_2_31_logits(device: str, backend: str) -> None:
    """Kept whole, against float64 where its offsets are the largest, and against chunks."""
    if backend != "cuda":
        pytest.skip("16 GB of logits; test_emulation_engine.py has the kernels' offsets")
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("16 GB of logits, and others may be at work on this GPU")
    p = problem(4096, 64, 1_000_000, torch.float32, device)
    whole = run(p, IN_BUDGET, margin=4, lam=1.0, reduction="sum")
    last = Problem(p.x[-4:].detach().requires_grad_(), p.w, p.y[-4:])
    _, dx, _ = last.true_loss(margin=4, lam=1.0, reduction="sum")
    assert relative_error(whole[1][-4:], dx) < 1e-5
    in_chunks = run(p, ("classes", 100_000), margin=4, lam=1.0, reduction="sum")
    assert_close(whole, in_chunks, 1e-6, 1e-5)
