"""The loss without an N x C array: chunks of classes, and chunks of rows, at the level of the ops.

Numbers against float64, as in test_loss.py; which of the ways a call takes is test_plan.py's, and
difficult numbers are test_chunks_numbers.py's.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from chunks import IN_BUDGET, assert_close, bounds_for, fixed_arguments, run
from problems import problem, relative_error
from test_loss import FLOATS, OPTIONS

# One class, one and more packs, ragged, all, more than all; and as many rows.
WAYS = [("classes", k) for k in (1, 7, 8, 40, 101, 1000)] + [("rows", k) for k in (1, 7, 33, 100)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]}{way[1]}")
def test_every_size_of_chunk(way: tuple[str, int], dtype: torch.dtype, device: str) -> None:
    p = problem(33, 24, 101, dtype, device)
    options = {"margin": 4, "lam": 0.5}
    assert_close(run(p, way, **options), p.true_loss(**options), *bounds_for(p, **options))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-2), (torch.float16, 6e-3)])
def test_sums_over_chunks_are_wide(dtype: torch.dtype, bound: float, device: str) -> None:
    """All class vectors have 50 in common, which cancels at the end: what is rounded on the way
    there to 16 bits shows.
    """
    p = problem(33, 24, 101, dtype, device)
    with torch.no_grad():
        p.w[:, 0] += 50
        p.x[:, 0] = 0
    _, dx, _ = run(p, ("classes", 1), margin=1)
    assert relative_error(dx, p.true_loss(margin=1, lam=0.0)[1]) < bound


@pytest.mark.parametrize(("n", "d", "c"), [(1, 1, 1), (1, 7, 10), (5, 2, 1), (40, 513, 9)])
def test_every_shape(n: int, d: int, c: int, device: str) -> None:
    p = problem(n, d, c, torch.float64, device)
    for way in (("classes", 3), ("rows", 3)):
        assert_close(run(p, way, margin=3, lam=0.5), p.true_loss(margin=3, lam=0.5), 1e-11, 1e-9)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option(options: dict, dtype: torch.dtype, device: str) -> None:
    """Ignored rows among others and as a whole chunk; class weights, one of them 0."""
    p = problem(19, 12, 37, dtype, device)
    p.y[::4] = -7
    p.y[6:12] = -7
    weight = None
    if options["weight"]:
        weight = torch.rand(37).double().to(device) + 0.1
        weight[p.y[1]] = 0
    options = {**options, "weight": weight, "ignore_index": -7, "margin": 3, "lam": 0.7}
    truth, bounds = p.true_loss(**options), bounds_for(p, **options)
    for way in (("classes", 16), ("rows", 6)):
        if way[0] == "rows" and options["reduction"] == "none":
            continue
        ours = run(p, way, **options)
        assert_close(ours, truth, *bounds)
        assert (ours[1][p.y == -7] == 0).all(), "an ignored row has no gradient"


def test_ways_agree_to_the_last_digits(device: str) -> None:
    """What the chunks do is no other formula: in float64 nothing but the order of sums differs."""
    p = problem(30, 16, 50, torch.float64, device, norm=30.0)
    p.y[3] = -100
    options = {"margin": 4, "lam": 0.1, "label_smoothing": 0.2, "weight": torch.rand(50).to(device)}
    kept = run(p, IN_BUDGET, **options)
    for way in (("classes", 9), ("rows", 11)):
        assert_close(run(p, way, **options), kept, 1e-13, 1e-13)


def test_ignored_rows_may_hold_anything(device: str) -> None:
    """NaN and Inf in an ignored row reach nothing, in no chunk; ignore_index may be a class."""
    for way, smoothing in itertools.product((("classes", 2), ("rows", 2)), (0.0, 0.3)):
        p = problem(5, 4, 6, torch.float32, device)
        p.y[2] = 3
        options = {"ignore_index": 3, "label_smoothing": smoothing, "margin": 2}
        expected = run(p, way, **options)
        with torch.no_grad():
            p.x[2] = torch.tensor([math.nan, math.inf, 0, 1])
        for value, before in zip(run(p, way, **options), expected, strict=True):
            torch.testing.assert_close(value, before)


def test_nan_and_infinity_show(device: str) -> None:
    """In a row that counts they are not hidden: loss and gradient are NaN there, and only there."""
    for bad in (math.nan, math.inf, -math.inf):
        p = problem(4, 3, 9, torch.float32, device)
        with torch.no_grad():
            p.x[1] = bad
        for way in (IN_BUDGET, ("classes", 4)):
            loss, dx, _ = run(p, way, reduction="none")
            wrong = torch.tensor([False, True, False, False], device=device)
            assert torch.equal(loss.isnan(), wrong), (bad, way)
            assert torch.equal(dx.isnan().any(1), wrong), (bad, way)


@pytest.mark.parametrize("way", [("classes", 4), ("rows", 2)])
def test_no_rows_and_none_kept(way: tuple[str, int], device: str) -> None:
    p = problem(0, 4, 9, torch.float32, device)
    loss, dx, dw = run(p, way, reduction="sum")
    assert (loss, dx.shape) == (0, (0, 4))
    assert torch.equal(dw, torch.zeros(9, 4, device=device))
    assert run(p, way)[0].isnan()  # 0 / 0, as torch
    p = problem(3, 4, 9, torch.float32, device)
    p.y.fill_(-100)
    for reduction in ("sum", "mean"):
        loss, dx, dw = run(p, way, reduction=reduction, label_smoothing=0.1)
        assert loss == 0 if reduction == "sum" else loss.isnan()
        assert not dx.any()
        assert not dw.any(), "nothing to learn from, and no NaN in the weights"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_that_nobody_wants(dtype: torch.dtype, device: str) -> None:
    p = problem(9, 7, 12, dtype, device)
    fixed = fixed_arguments(p, label_smoothing=0.1)
    rows = torch.ops.lsoftmax.loss_and_gradients
    _, *both, _ = rows(*fixed, 4, True, True)
    loss, e, saved, divisor, _ = torch.ops.lsoftmax.loss_fwd(*fixed, True, 5)
    arguments = (torch.ones_like(loss), *fixed[:3], None, e, saved, divisor, -100, 0.1, 5)
    both_classes = torch.ops.lsoftmax.loss_bwd(*arguments, True, True)
    for needs in ((True, False), (False, True)):
        for values, all_values in (
            (rows(*fixed, 4, *needs)[1:3], both),
            (torch.ops.lsoftmax.loss_bwd(*arguments, *needs), both_classes),
        ):
            for value, expected, need in zip(values, all_values, needs, strict=True):
                assert torch.equal(value, expected) if need else value.shape == (0,)


def test_without_backward_nothing_is_kept(device: str) -> None:
    p = problem(9, 7, 12, torch.float32, device)
    fixed = fixed_arguments(p)
    loss, e, rows, *_ = torch.ops.lsoftmax.loss_fwd(*fixed, False, 5)
    assert (e.shape, rows.shape) == ((0,), (0,))
    assert torch.equal(loss, torch.ops.lsoftmax.loss_fwd(*fixed, True, 5)[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bitwise_repeatable_and_inputs_left_alone(dtype: torch.dtype, device: str) -> None:
    p = problem(64, 33, 11, dtype, device)  # every class many times: sums of many shares
    before = [t.detach().clone() for t in (p.x, p.w, p.y)]
    for way in (("classes", 4), ("rows", 10)):
        runs = [run(p, way, margin=4, lam=0.2, label_smoothing=0.1) for _ in range(3)]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))
    for value, old in zip((p.x, p.w, p.y), before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_are_compared_in_pairs(dtype: torch.dtype, device: str) -> None:
    """The rows are sorted by target in two ways, by a kernel and by torch: see csrc/host.h."""
    p = problem(4200, 3, 5, dtype, device)
    p.y[::7] = -100
    truth, bounds = p.true_loss(lam=0.3), bounds_for(p, lam=0.3)
    for way in (IN_BUDGET, ("classes", 3), ("rows", 4150)):
        assert_close(run(p, way, lam=0.3), truth, *bounds)


def test_sanitizer_smoke_of_chunks(device: str) -> None:
    """Both kinds, with a ragged last chunk: see test_loss.py's."""
    for dtype, smoothing in itertools.product((torch.float32, torch.bfloat16), (0.0, 0.1)):
        p = problem(9, 7, 300, dtype, device)
        for way in (("classes", 64), ("rows", 4)):
            run(p, way, margin=3, label_smoothing=smoothing)


# ---- what is refused -----------------------------------------------------------------------------


def test_no_memory_says_what_was_asked_for(device: str, backend: str) -> None:
    """2^46 logits are 256 TB, which no machine gives; what is given is left as it was."""
    if backend == "portable":
        pytest.skip("torch's own error there")
    n, c = 2**22, 2**24
    x, w = torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device)
    y, lam = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros((), device=device)
    fixed = (x.expand(n, 1), w.expand(c, 1), y.expand(n), 2, lam, None, 1, -100, 0.0)
    expected = rf"{n * c * 4} bytes.*\[{n}, {c}\].*memory_budget={n * c}"
    ops = torch.ops.lsoftmax
    for call in (
        lambda: ops.loss_fwd(*fixed, True, 0),
        lambda: ops.loss_fwd(*fixed, False, 0),
        lambda: ops.loss_fwd(*fixed, True, c),
        lambda: ops.loss_and_gradients(*fixed, n, True, False),
    ):
        with pytest.raises(torch.OutOfMemoryError, match=expected):
            call()
    assert (x, w, y) == (0, 0, 0)


def test_wrong_chunks(device: str, backend: str) -> None:
    if backend == "portable":
        pytest.skip("the plan gives no such chunks: here they are the engine's to refuse")
    p = problem(3, 2, 4, torch.float32, device)
    fixed, ops = fixed_arguments(p), torch.ops.lsoftmax
    with pytest.raises(RuntimeError, match=r"class_chunk.*>= 0.*-1"):
        ops.loss_fwd(*fixed, True, -1)
    with pytest.raises(RuntimeError, match=r"row_chunk.*>= 1.*0"):
        ops.loss_and_gradients(*fixed, 0, True, True)
    with pytest.raises(RuntimeError, match=r"reduction.*mean or sum.*0"):
        ops.loss_and_gradients(*fixed[:6], 0, *fixed[7:], 2, True, True)
