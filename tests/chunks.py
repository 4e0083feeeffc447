"""The ops of the loss in chunks of classes or of rows, and how near float64 they must be."""

from __future__ import annotations

import torch
from torch import Tensor

from lsoftmax.margin import accumulate_type
from problems import Problem, relative_error, rounding_error

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
IN_BUDGET = ("classes", 0)
UPSTREAM = 0.5  # what Problem.loss sends into a scalar


def fixed_arguments(p: Problem, **options) -> tuple:
    options = {"lam": 0.0, "weight": None, "reduction": "mean", "ignore_index": -100, **options}
    weight = options["weight"]
    return (
        p.x.detach(),
        p.w.detach(),
        p.y,
        options.get("margin", 4),
        torch.tensor(options["lam"], device=p.x.device),
        None if weight is None else weight.to(accumulate_type(p.x.dtype)),
        REDUCTIONS[options["reduction"]],
        options["ignore_index"],
        options.get("label_smoothing", 0.0),
    )


def run(
    p: Problem, way: tuple[str, int], loss_scale: float = 1.0, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by ("classes", chunk) or ("rows", chunk); upstream as in Problem.loss.

    With a ``loss_scale`` as float16 has it: small gradients are not in its range.
    """
    along, chunk = way
    fixed = fixed_arguments(p, **options)
    if along == "rows":
        loss, dx, dw, _ = torch.ops.lsoftmax.loss_and_gradients(*fixed, chunk, True, True)
        assert dx.dtype == dw.dtype == loss.dtype
        return loss, dx * UPSTREAM, dw * UPSTREAM  # of any size in float32: no scale
    loss, e, rows, divisor, _ = torch.ops.lsoftmax.loss_fwd(*fixed, True, chunk)
    assert chunk == 0 or e.shape == (0,)
    assert rows.shape == (5, p.x.shape[0])
    grad = torch.full_like(loss, UPSTREAM * loss_scale)
    if loss.dim() == 1:
        grad = torch.linspace(0.5, 1.5, len(loss)).to(loss) * loss_scale
    saved = (p.x.detach(), p.w.detach(), p.y, fixed[5], e, rows, divisor, *fixed[7:])
    dx, dw = torch.ops.lsoftmax.loss_bwd(grad, *saved, chunk, True, True)
    return (
        (loss, dx, dw)
        if loss_scale == 1
        else (loss, dx.double() / loss_scale, dw.double() / loss_scale)
    )


def assert_close(
    ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], loss_bound: float, gradient_bound: float
) -> None:
    bounds = (loss_bound, gradient_bound, gradient_bound)
    for name, value, true, bound in zip(("loss", "dx", "dw"), ours, truth, bounds, strict=True):
        assert value.shape == true.shape, name
        assert relative_error(value, true) <= bound, name


def bounds_for(p: Problem, **options) -> tuple[float, float]:
    """Of loss and gradients, docs/design.md's: in 16 bits twice what roundings cost."""
    exact = {torch.float64: (1e-11, 1e-11), torch.float32: (2e-6, 1e-5)}.get(p.x.dtype)
    return exact or (1e-4, 2 * rounding_error(p, p.x.dtype, **options))
