"""The ops' gradients: one ``torch.autograd.Function`` each, and what the layers call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops as ops  # defines what follows
from .checks import is_transformed
from .plan import Plan

# Overloads: to look one up at each call would take as long as the call.
_loss_fwd = torch.ops.lsoftmax.loss_fwd.default
_loss_bwd = torch.ops.lsoftmax.loss_bwd.default
_loss_and_gradients = torch.ops.lsoftmax.loss_and_gradients.default
_linear_fwd = torch.ops.lsoftmax.linear_fwd.default
_linear_bwd = torch.ops.lsoftmax.linear_bwd.default


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "lsoftmax.functional is differentiable once; lsoftmax.reference, with the same "
            "signatures, is differentiable twice"
        )


def once(gradient: Tensor, *sources: Tensor) -> Tensor:
    """Says that a gradient has no gradient, where it would silently count as a constant."""
    return _Once.apply(gradient, *sources)


def _gradients(ctx: Any, dx: Tensor, dw: Tensor, input: Tensor, linear_weight: Tensor) -> Any:
    """What backward returns: None for what was not asked for, and no second derivatives."""
    need_input, need_weight, *rest = ctx.needs_input_grad
    if torch.is_grad_enabled():  # create_graph=True
        dx, dw = (once(gradient, input, linear_weight) for gradient in (dx, dw))
    return dx if need_input else None, dw if need_weight else None, *[None] * len(rest)


def _no_gradients(ctx: Any) -> tuple[None, ...]:
    """What backward returns where it was given none."""
    return (None,) * len(ctx.needs_input_grad)


def _measured(ctx: Any, cosine: Tensor) -> Tensor:
    """The output of a forward that has no gradient, and for which none is to be made of zeros."""
    ctx.mark_non_differentiable(cosine)
    ctx.set_materialize_grads(False)
    return cosine


class _Loss(torch.autograd.Function):
    """loss_fwd with loss_bwd as its gradient. Saves only what it made, and changes none of it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        input, linear_weight, target, _, _, weight, *_ = args
        *_, ctx.ignore_index, ctx.label_smoothing, _save, ctx.class_chunk = args
        loss, e, rows, divisor, cosine = _loss_fwd(*args)
        ctx.save_for_backward(input, linear_weight, target, weight, e, rows, divisor)
        return loss, _measured(ctx, cosine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return _no_gradients(ctx)
        saved = ctx.saved_tensors
        options = (ctx.ignore_index, ctx.label_smoothing, ctx.class_chunk)
        needed = ctx.needs_input_grad[:2]
        dx, dw = _loss_bwd(grad, *saved, *options, *needed)
        return _gradients(ctx, dx, dw, *saved[:2])


def _scaled(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Their product, rounded to the type; on a GPU without an array in between, of C x D maybe."""
    batched = is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)
    if gradient.dtype == dtype or batched or torch.compiler.is_compiling():
        return (gradient * grad).to(dtype)
    with torch.no_grad():  # out= has no gradient; ``once`` says so of this one
        return torch.mul(gradient, grad, out=torch.empty_like(gradient, dtype=dtype))


class _LossAndGradients(torch.autograd.Function):
    """loss_and_gradients: backward only scales what forward has formed, and keeps it as it was."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[:2]
        loss, dx, dw, cosine = _loss_and_gradients(*args, *needed)
        ctx.save_for_backward(*args[:2], dx, dw)
        return loss, _measured(ctx, cosine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return _no_gradients(ctx)
        input, linear_weight, dx, dw = ctx.saved_tensors
        dx, dw = _scaled(dx, grad, input.dtype), _scaled(dw, grad, linear_weight.dtype)
        return _gradients(ctx, dx, dw, input, linear_weight)


class _Linear(torch.autograd.Function):
    """linear_fwd with linear_bwd as its gradient."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        logits, coefficients, cosine = _linear_fwd(*args)
        ctx.save_for_backward(*args[:3], coefficients)
        return logits, _measured(ctx, cosine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return _no_gradients(ctx)
        needed = ctx.needs_input_grad[:2]
        saved = ctx.saved_tensors
        dx, dw = _linear_bwd(grad, *saved, *needed)
        return _gradients(ctx, dx, dw, *saved[:2])


def loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int,
    lam: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """The fused loss of checked arguments, differentiable once in the two matrices; and the low
    cosine of the kept rows (``rows.low_cosine``), 0-dim float32.
    """
    args = (input, linear_weight, target, margin, lam, weight, reduction, ignore_index)
    if not (torch.is_grad_enabled() and (input.requires_grad or linear_weight.requires_grad)):
        loss, *_, cosine = _loss_fwd(*args, label_smoothing, False, plan.class_chunk)
        return loss, cosine
    if plan.row_chunk:
        return _LossAndGradients.apply(*args, label_smoothing, plan.row_chunk)
    return _Loss.apply(*args, label_smoothing, True, plan.class_chunk)


def linear(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """The margin logits of checked arguments, differentiable once in the two matrices; and the
    low cosine, as of ``loss``.
    """
    return _Linear.apply(input, linear_weight, target, margin, lam)
