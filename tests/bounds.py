"""How far from float64 a right result may be: what the roundings of its type can do, row by row.

Neither a loss nor a gradient has one relative error that holds for all inputs: sums cancel, a logit
of 1e6 is known to 0.06 in float32, and where two of these are about alike so is not even which of
the classes is the likelier. So each row of dX and of dW is compared with the sizes of all that was
added up to it: the design's relative errors of that, and what the roundings of logits and cosines
make of it. Where nothing cancels and logits are ordinary that is the design's bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsoftmax import reference
from lsoftmax.margin import accumulate_type

# Relative errors of a loss and of a gradient. In 16 bits a gradient has seen three roundings: of
# an exponential, of a feature times its scale, and its own.
LOSS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
GRADIENT = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 3 * 2**-8,
    torch.float16: 2**-9,
}
LOGIT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
_STEPS = 4.0  # roundings that a term of a sum has seen, over the root of how many terms there are


class Bounds(NamedTuple):
    """Absolute: of each row's loss (N,), or its logits (N, C); of the length of the gradients' rows
    (N,) and (C,).
    """

    out: Tensor
    dx: Tensor
    dw: Tensor


class Geometry(NamedTuple):
    """Of each row (N,) and its class vector, float64; errors are what roundings make of it."""

    a: Tensor  # |x|
    b: Tensor  # |w_y|
    f: Tensor
    f_error: Tensor
    slope: (
        Tensor  # |alpha| + |beta| |x| / |w_y|: the length of df/dx over |w_y|, if nothing cancels
    )
    slope_error: Tensor


def rounding(dtype: torch.dtype, d: int) -> float:
    """The relative error of a logit before it is stored in 16 bits, and of a cosine."""
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    return _STEPS * (2 + d**0.5) * unit


def geometry(x: Tensor, w_y: Tensor, margin: int, lam: float, unit: float) -> Geometry:
    """``unit``: the relative error of a cosine."""
    a, b = x.norm(dim=1), w_y.norm(dim=1)
    s = a * b
    zero = s == 0
    c = torch.where(zero, 1.0, (x * w_y).sum(1) / torch.where(zero, 1.0, s)).requires_grad_()
    with torch.enable_grad():
        psi = reference.psi(c, margin)
        (slope,) = torch.autograd.grad(psi.sum(), c, create_graph=True)
        bend = torch.autograd.grad(slope.sum(), c)[0] if margin > 1 else torch.zeros_like(c)
    c, psi, slope = c.detach(), psi.detach(), slope.detach()
    share = 1 / (1 + lam)
    # Near its class vector the cosine comes from the chord, which is exact where it is 0.
    c_error = unit * torch.where(c > 0.9, (10 * (1 - c)).abs() + unit, 1.0)
    f = torch.where(zero, 0.0, s * (psi + lam * c) * share)
    f_error = s * (slope.abs() + lam) * share * c_error + unit * f.abs()
    factor = ((lam + slope) * share).abs() + ((psi - c * slope) * share).abs()
    factor = torch.where(zero, 1.0, factor)
    return Geometry(a, b, f, f_error, factor, 2 * bend.abs() * share * c_error)


def tiny(dtype: torch.dtype) -> float:
    """What is too small for an exponential."""
    return 2.0**-1000 if dtype == torch.float64 else 2.0**-120


def least(dtype: torch.dtype, d: int, terms: int = 1) -> float:
    """The length of D elements, each the sum of so many terms, all too small for the result's type.

    Processors that multiply bfloat16 (VDPBF16PS) take a subnormal float32 among the terms for 0.
    """
    info = torch.finfo(dtype)
    lost = terms if dtype == torch.bfloat16 else info.eps
    return float(info.tiny * lost * d**0.5)


def loss_bounds(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
    *,
    margin: int,
    lam: float,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    remade: bool = False,
) -> Bounds:
    """Of ``lsoftmax_loss``; ``x`` and ``w`` are float64 copies of inputs in ``dtype``.

    ``upstream`` (N,): the gradient of the objective with respect to each row's loss. ``remade``: of
    logits that are computed twice, which need not round alike; where one rounding is more than 1,
    a probability made of both may be more than 1 as well, and there nothing is known of it.
    """
    n, d, num_classes = x.shape[0], x.shape[1], w.shape[0]
    kept = (y != ignore_index).double()
    index = torch.where(y == ignore_index, 0, y)
    class_weight = w.new_ones(num_classes) if weight is None else weight.double()
    w_y, w_sum = class_weight[index], class_weight.sum()
    uniform = label_smoothing / num_classes
    total = (1 - label_smoothing) * w_y + uniform * w_sum
    w_norms, scale = w.norm(dim=1), upstream.abs() * kept
    most = 1e200 if remade else 1.0  # times a norm of 0 it is 0

    loss = tiny(dtype) * total + least(accumulate_type(dtype), 1)
    dx = least(dtype, d, num_classes) + x.new_zeros(n)
    dw = least(dtype, d, n) + x.new_zeros(num_classes)
    # Ours, and the reference's own in float64, which has 1 - p_y from a difference.
    ours, truth = (dtype, GRADIENT[dtype], 0.0), (torch.float64, 1e-13, rounding(torch.float64, d))
    for kind, relative, floor in (ours, truth):
        unit = rounding(kind, d)
        g = geometry(x, w[index], margin, lam, unit)
        logits = (x @ w.t()).scatter(1, index.unsqueeze(1), g.f.unsqueeze(1))
        others = logits.softmax(1).scatter(1, index.unsqueeze(1), 0.0)
        rest = others.sum(1)  # 1 - p_y
        size = g.a * w_norms.amax() + g.f.abs()
        logit_error = unit * size + g.f_error
        growth = torch.expm1(2 * logit_error.clamp(max=300))  # of a probability, at most

        # softplus(L - f) is known to 1 - p_y times the error of L - f, while that is small.
        gap = torch.where(growth < 0.1, rest * growth, logit_error)
        smooth = logit_error if label_smoothing > 0 else 0.0
        loss = loss + total * (gap + smooth + floor * (1 + size))

        off = (others * (growth + relative).unsqueeze(1) + tiny(dtype)).clamp(max=most)
        unknown = logit_error > 300  # even which of the classes is the likelier
        off = torch.where(unknown.unsqueeze(1), most, off)
        off = (off * total.unsqueeze(1) + relative * uniform * class_weight) * scale.unsqueeze(1)
        own = (rest * (growth + relative) + tiny(dtype)).clamp(max=1.0)
        own = total * (torch.where(unknown, 1.0, own) + floor)
        own = own + relative * uniform * (w_sum + w_y)
        own_size = total * (rest + floor) + uniform * (w_sum - w_y)
        own = (own * (g.slope + g.slope_error) + own_size * g.slope_error) * scale
        dx += off @ w_norms + own * g.b
        dw += (off.t() @ g.a).index_add(0, index, own * g.a)
    plain = torch.nn.functional.cross_entropy(
        logits, index, weight=class_weight, label_smoothing=label_smoothing, reduction="none"
    )
    return Bounds((loss + LOSS[dtype] * plain.abs()) * kept, dx * kept, dw)


def linear_bounds(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
    *,
    margin: int,
    lam: float,
) -> Bounds:
    """Of ``lsoftmax_linear``; ``upstream`` (N, C) is the gradient of the logits."""
    d = x.shape[1]
    unit = rounding(dtype, d)
    g = geometry(x, w[y], margin, lam, unit)
    column = y.unsqueeze(1)
    w_norms = w.norm(dim=1)
    size = torch.outer(g.a, w_norms)
    logits = (x @ w.t()).scatter(1, column, g.f.unsqueeze(1)).abs()
    out = unit * size.scatter_add(1, column, (g.f_error / unit + g.f.abs()).unsqueeze(1))
    out = out + LOGIT[dtype] * logits + least(dtype, 1, d)
    grad = upstream.abs()
    own = grad.gather(1, column).squeeze(1)
    # Backward's products hold the target's with a slope of 1, and the rest is added.
    own = own * (GRADIENT[dtype] * (1 + g.slope) + g.slope_error)
    dx = GRADIENT[dtype] * (grad @ w_norms) + own * g.b + least(dtype, d, len(w))
    dw = GRADIENT[dtype] * (grad.t() @ g.a) + least(dtype, d, len(x))
    return Bounds(out, dx, dw.index_add(0, y, own * g.a))


def assert_within(value: Tensor, truth: Tensor, bound: Tensor, what: str) -> None:
    """Each row no farther from the truth than its bound, in the Euclidean sense."""
    error = value.double() - truth
    error = error.norm(dim=-1) if error.dim() > bound.dim() else error.abs()
    if not (error <= bound).all():
        excess = (error - bound).flatten()
        worst = int(excess.nan_to_num(nan=torch.inf).argmax())
        error, bound = (t.expand_as(error).flatten()[worst].item() for t in (error, bound))
        numbers = f"number {worst} of {len(excess)}: error {error}, bound {bound}"
        raise AssertionError(f"{what}, {numbers}")
