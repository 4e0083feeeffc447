"""The fused loss and its gradients, on every backend, against float64 and code not ours."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from bounds import assert_within, loss_bounds
from chunks import fixed_arguments
from lsoftmax import functional, reference
from problems import Problem, assert_right, problem, relative_error, rounding_error

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# 0, 1 and 33 rows: none, one, more than a warp has lanes. 1, 2, 7, 64, 513 features: less than a
# 16-byte pack, one, ragged, whole packs, misaligned rows. 1, 2, 10, 1001, 4099 classes: no other
# class, one, less than a warp's packs, ragged, more than a block loads at once.
@pytest.mark.parametrize(
    ("n", "d", "c"),
    [
        *itertools.product((1, 33), (1, 7, 513), (1, 10, 1001)),
        *[(33, 2, 2), (33, 64, 2), (33, 64, 4099), (1, 2, 4099)],
    ],
)
def test_every_size_and_type(n: int, d: int, c: int, device: str) -> None:
    # A gradient of one number is a sum that may cancel to a few digits, and in 16 bits to none.
    loose = 1000 if min(n, d) == 1 else 1
    assert_right(problem(n, d, c, torch.float64, device), 1e-12, 1e-12 * loose, margin=4, lam=0.5)
    assert_right(problem(n, d, c, torch.float32, device), 1e-6, 1e-5 * loose, margin=3, lam=2.0)
    for dtype in (torch.bfloat16, torch.float16):
        p = problem(n, d, c, dtype, device)
        bound = 2 * rounding_error(p, dtype, margin=4, lam=0.5) if loose == 1 else math.inf
        assert_right(p, 1e-5, bound, margin=4, lam=0.5)
        assert_gradient_rows_right(p, margin=4, lam=0.5)


def assert_gradient_rows_right(p: Problem, margin: int, lam: float) -> None:
    """Each row by the sizes of what was added up to it, however much of that cancels."""
    _, *ours = p.loss(margin=margin, lam=lam)
    _, *truth = p.true_loss(margin=margin, lam=lam)
    x, w = p.x.detach().double(), p.w.detach().double()
    upstream = x.new_full(p.y.shape, 0.5 / len(x))  # Problem.loss's, of a mean
    bounds = loss_bounds(
        *(x, w, p.y, upstream, p.x.dtype),
        margin=margin,
        lam=lam,
        weight=None,
        ignore_index=-100,
        label_smoothing=0.0,
    )
    for name, value, true, bound in zip(("dx", "dw"), ours, truth, bounds[1:], strict=True):
        assert_within(value, true, bound, name)


@pytest.mark.parametrize("margin", [1, 2, 5, 16])
@pytest.mark.parametrize("norm", [0.1, 30.0])
def test_every_margin(margin: int, norm: float, device: str) -> None:
    assert_right(problem(20, 16, 50, torch.float64, device, norm), 1e-11, 1e-11, margin=margin)
    assert_right(problem(20, 16, 50, torch.float32, device, norm), 1e-6, 1e-5, margin=margin)


OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing, "weight": weighted}
    for reduction, smoothing, weighted in itertools.product(
        ("mean", "sum", "none"), (0.0, 0.1, 1.0), (False, True)
    )
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option(options: dict, dtype: torch.dtype, device: str) -> None:
    """Ignored rows among others, against F.cross_entropy on the margin logits."""
    p = problem(19, 12, 37, dtype, device)
    p.y[::4] = -7
    weight = torch.rand(37).double().to(device) + 0.1 if options["weight"] else None
    options = {**options, "weight": weight, "ignore_index": -7, "margin": 3, "lam": 0.7}
    exact = dtype in (torch.float64, torch.float32)
    bound = {torch.float64: 1e-11, torch.float32: 2e-6}.get(dtype, 1e-4)
    gradient = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 0)
    if not exact:
        gradient = 2 * rounding_error(p, dtype, **options)
    assert_right(p, bound, gradient, **options)
    _, dx, _ = p.loss(**options)
    assert (dx[::4] == 0).all(), "an ignored row has no gradient"


def test_one_margin_is_cross_entropy(device: str) -> None:
    """margin 1, and any margin with a large lam, is torch's loss of torch's logits."""
    p = problem(40, 24, 60, torch.float64, device)
    theirs = F.cross_entropy(F.linear(p.x, p.w), p.y)
    dx, dw = torch.autograd.grad(theirs, (p.x, p.w))
    for options, bound in (({"margin": 1}, 1e-12), ({"margin": 4, "lam": 1e12}, 1e-9)):
        loss = functional.lsoftmax_loss(p.x, p.w, p.y, **options)
        ours = torch.autograd.grad(loss, (p.x, p.w))
        assert relative_error(loss.detach(), theirs.detach()) < bound
        assert relative_error(ours[0], dx) < bound
        assert relative_error(ours[1], dw) < bound


@pytest.mark.parametrize("margin", [2, 3, 4])
def test_against_pytorch_metric_learning(margin: int, device: str) -> None:
    """lam = 0 is their loss; but for zero rows, which have no gradient there."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    p = problem(16, 8, 10, torch.float64, device)
    theirs = losses.LargeMarginSoftmaxLoss(10, 8, margin=margin, scale=1).to(device)
    theirs.W = torch.nn.Parameter(p.w.detach().t().clone())
    x = p.x.detach().clone().requires_grad_()
    loss = theirs(x, p.y)
    loss.backward()
    ours = functional.lsoftmax_loss(p.x, p.w, p.y, margin)
    dx, dw = torch.autograd.grad(ours, (p.x, p.w))
    assert relative_error(ours.detach(), loss.detach()) < 1e-9
    assert relative_error(dx, x.grad) < 1e-9
    assert relative_error(dw, theirs.W.grad.t()) < 1e-9


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(smoothing: float, device: str) -> None:
    """Finite differences, with a gradient per row; so few cosines meet no bucket edge."""
    p = problem(5, 3, 6, torch.float64, device)
    weight = torch.rand(6).double().to(device) + 0.5

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.lsoftmax_loss(
            x, w, p.y, 3, 0.4, reduction="none", weight=weight, label_smoothing=smoothing
        )

    assert torch.autograd.gradcheck(run, (p.x, p.w), nondet_tol=0.0)


# ---- behaviour -----------------------------------------------------------------------------------


def test_no_rows(device: str) -> None:
    x = torch.empty(0, 4, device=device, requires_grad=True)
    w = torch.randn(3, 4, device=device, requires_grad=True)
    y = torch.empty(0, dtype=torch.int64, device=device)
    assert functional.lsoftmax_loss(x, w, y, reduction="mean").isnan()  # 0 / 0, as torch
    assert functional.lsoftmax_loss(x, w, y, reduction="none").shape == (0,)
    loss = functional.lsoftmax_loss(x, w, y, reduction="sum")
    loss.backward()
    assert loss == 0
    assert x.grad.shape == (0, 4)
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_all_rows_ignored(device: str) -> None:
    p = problem(3, 4, 5, torch.float32, device)
    p.y.fill_(-100)
    loss, dx, dw = p.loss(reduction="sum")
    assert loss == 0
    assert not dx.any()
    assert not dw.any()
    loss = functional.lsoftmax_loss(p.x, p.w, p.y)
    assert loss.isnan()  # 0 / 0, as torch
    for gradient in torch.autograd.grad(loss, (p.x, p.w)):
        assert not gradient.any(), "nothing to learn from, and no NaN in the weights"


def test_ignored_rows_may_hold_anything(device: str) -> None:
    """NaN and Inf in an ignored row reach nothing; ignore_index may be a class."""
    for smoothing in (0.0, 0.3):
        p = problem(5, 4, 6, torch.float32, device)
        p.y[2] = 3
        options = {"ignore_index": 3, "label_smoothing": smoothing, "margin": 2}
        expected = p.loss(**options)
        with torch.no_grad():
            p.x[2] = torch.tensor([math.nan, math.inf, 0, 1])
        for value, before in zip(p.loss(**options), expected, strict=True):
            torch.testing.assert_close(value, before)


def test_a_single_sample(device: str) -> None:
    p = problem(1, 6, 4, torch.float64, device)
    one = functional.lsoftmax_loss(p.x[0], p.w, p.y[0], reduction="none")
    assert one.shape == ()
    batch = functional.lsoftmax_loss(p.x, p.w, p.y, reduction="none")
    torch.testing.assert_close(one, batch[0])


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_frozen_inputs(frozen: str, device: str) -> None:
    p = problem(9, 7, 12, torch.float32, device)
    _, dx, dw = p.loss(label_smoothing=0.1)
    getattr(p, frozen).requires_grad_(False)
    loss = functional.lsoftmax_loss(p.x, p.w, p.y, label_smoothing=0.1)
    wanted, expected = (p.w, dw) if frozen == "x" else (p.x, dx)
    (gradient,) = torch.autograd.grad(loss, wanted, torch.tensor(0.5, device=device))
    assert torch.equal(gradient, expected)


def test_no_gradient_wanted(device: str) -> None:
    p = problem(9, 7, 12, torch.float32, device)
    expected = functional.lsoftmax_loss(p.x, p.w, p.y)
    with torch.no_grad():
        assert torch.equal(functional.lsoftmax_loss(p.x, p.w, p.y), expected)
    detached = functional.lsoftmax_loss(p.x.detach(), p.w.detach(), p.y)
    assert not detached.requires_grad
    assert torch.equal(detached, expected)


def test_strides_and_alignment(device: str) -> None:
    """Transposed, sliced and one-element-off inputs give the numbers of their contiguous copies."""
    p = problem(10, 9, 11, torch.float32, device)
    odd = torch.empty(10 * 9 + 1, device=device)[1:].view(10, 9).copy_(p.x.detach())
    wide = torch.zeros(11, 20, device=device)
    wide[:, 3:12] = p.w.detach()
    targets = torch.stack((p.y, p.y), dim=1)[:, 0]
    for x in (odd, p.x.detach().t().contiguous().t()):
        variant = Problem(x.requires_grad_(), wide[:, 3:12].requires_grad_(), targets)
        for value, expected in zip(variant.loss(), p.loss(), strict=True):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("d", "c"), [(16, 40), (40, 9)])  # the smaller factor, X or E, is scaled
def test_second_backward_and_saved_tensors(d: int, c: int, device: str) -> None:
    """Backward changes nothing it saved: with retain_graph it gives the same bits again."""
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(12, d, c, dtype, device)
        loss = functional.lsoftmax_loss(p.x, p.w, p.y, 4, 0.1)
        first = torch.autograd.grad(loss, (p.x, p.w), retain_graph=True)
        second = torch.autograd.grad(loss, (p.x, p.w))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bitwise_repeatable(device: str) -> None:
    p = problem(64, 33, 5, torch.float32, device)  # every class many times: sums of many shares
    runs = [p.loss(margin=4, lam=0.2, label_smoothing=0.1) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_double_backward_says_no(device: str) -> None:
    p = problem(4, 3, 5, torch.float64, device)
    loss = functional.lsoftmax_loss(p.x, p.w, p.y)
    (dx,) = torch.autograd.grad(loss, p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


def test_lam_tensor_is_read_not_saved(device: str) -> None:
    """lam is annealed in place: changing it between forward and backward must not matter."""
    p = problem(6, 5, 8, torch.float64, device)
    lam = torch.tensor(2.0, device=device)
    loss = functional.lsoftmax_loss(p.x, p.w, p.y, 3, lam)
    lam.zero_()
    ours = torch.autograd.grad(loss, (p.x, p.w))
    theirs = torch.autograd.grad(reference.lsoftmax_loss(p.x, p.w, p.y, 3, 2.0), (p.x, p.w))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_float16_keeps_no_more_digits_than_tensor_cores_read(backend: str, device: str) -> None:
    """11, as float16 itself: what backward multiplies, one kind of tensor core reads exactly."""
    p = problem(20, 24, 37, torch.float16, device)
    weight = torch.rand(37, device=device) + 0.5
    fixed = fixed_arguments(p, weight=weight, label_smoothing=0.1)
    _, e, *_ = torch.ops.lsoftmax.loss_fwd(*fixed, True, 0)
    if backend != "portable":
        assert (e.view(torch.int32) % 2**13 == 0).all()
    assert_right(
        p, 1e-4, 2 * rounding_error(p, p.x.dtype, label_smoothing=0.1), label_smoothing=0.1
    )


@pytest.mark.parametrize(("n", "d"), [(200, 40), (70, 300)])
def test_a_class_of_many_rows(n: int, d: int, device: str) -> None:
    """In bfloat16 the block of a class adds the rows up, 64 at a time: here there are more."""
    p = problem(n, d, 3, torch.bfloat16, device)
    p.y[:] = torch.where(p.y == 2, 1, p.y)  # one class has no row
    assert_right(p, 1e-4, 2 * rounding_error(p, p.x.dtype, margin=3, lam=0.5), margin=3, lam=0.5)


def test_sanitizer_smoke(device: str) -> None:
    """Every kernel of one batch, at sizes with every kind of edge: what a sanitizer is pointed at,
    with the tests of chunks, annealing, shards and the fused forward of the same name.
    """
    for dtype, (n, d, c) in itertools.product(FLOATS, ((3, 7, 10), (33, 64, 1001))):
        p = problem(n, d, c, dtype, device)
        p.y[0] = -100
        for reduction in ("mean", "none"):
            p.loss(reduction=reduction, label_smoothing=0.1, weight=torch.ones(c, device=device))
        p.loss()
        with torch.no_grad():
            functional.lsoftmax_loss(p.x, p.w, p.y)
        p.y[0] = c - 1
        p.logits(torch.randn(n, c, device=device).to(dtype))
