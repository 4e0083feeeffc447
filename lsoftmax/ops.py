"""The dispatcher's side: op schemas, their portable implementation, shapes for tracing, autograd.

The dispatcher is the fallback. Every op has its plain-torch implementation (``portable``,
``portable_linear``) on every device; the compiled extension, where it is loaded, registers a CUDA
implementation of the same ops, which then wins for CUDA tensors. Nothing else in the package asks
which one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _extension, portable, portable_linear
from .margin import accumulate_type
from .plan import Plan, free_memory
from .rows import NONE

library = torch.library.Library("lsoftmax", "DEF")
library.define(
    "loss_fwd(Tensor input, Tensor linear_weight, Tensor target, int margin, Tensor lam, "
    "Tensor? weight, int reduction, int ignore_index, float label_smoothing, bool save, "
    "int class_chunk) -> (Tensor loss, Tensor e, Tensor rows, Tensor divisor)"
)
library.define(
    "loss_bwd(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, Tensor? weight, "
    "Tensor e, Tensor rows, Tensor divisor, int ignore_index, float label_smoothing, "
    "int class_chunk, bool need_input, bool need_weight) -> (Tensor, Tensor)"
)
library.define(
    "loss_and_gradients(Tensor input, Tensor linear_weight, Tensor target, int margin, Tensor lam, "
    "Tensor? weight, int reduction, int ignore_index, float label_smoothing, int row_chunk, "
    "bool need_input, bool need_weight) -> (Tensor loss, Tensor grad_input, Tensor grad_weight)"
)
library.define(
    "linear_fwd(Tensor input, Tensor linear_weight, Tensor target, int margin, Tensor lam) "
    "-> (Tensor logits, Tensor coefficients)"
)
library.define(
    "linear_bwd(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, "
    "Tensor coefficients, bool need_input, bool need_weight) -> (Tensor, Tensor)"
)


def register_portable(name: str, function: Callable[..., Any]) -> None:
    """Make ``function`` the op's implementation on every device without one of its own."""
    first = 1 if name.endswith("bwd") else 0  # where the two matrices begin

    def run(*args: Any) -> Any:
        device = args[first].device.type
        if device == "cuda":
            _extension.warn_once_no_kernels()
        # The gradient's formula is one level up, and the caller has chosen the types.
        try:
            with torch.no_grad():
                if not torch.is_autocast_enabled(device):
                    return function(*args)
                with torch.autocast(device, enabled=False):
                    return function(*args)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise _out_of_memory(args[first], args[first + 1], error) from error

    library.impl(name, run, "CompositeExplicitAutograd")


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _out_of_memory(input: Tensor, linear_weight: Tensor, error: RuntimeError) -> RuntimeError:
    """The error with what was asked for, and what to do about it."""
    n, num_classes = input.shape[0], linear_weight.shape[0]
    budget = max(1, min(n * num_classes // 2, free_memory(input.device) // 8))
    return torch.OutOfMemoryError(
        f"out of memory in L-Softmax of input {tuple(input.shape)} and linear_weight "
        f"{tuple(linear_weight.shape)}, {input.dtype}; lsoftmax_loss with memory_budget={budget} "
        f"(bytes) needs less. {str(error).splitlines()[0]}"
    )


register_portable("loss_fwd", portable.loss_fwd)
register_portable("loss_bwd", portable.loss_bwd)
register_portable("loss_and_gradients", portable.loss_and_gradients)
register_portable("linear_fwd", portable_linear.linear_fwd)
register_portable("linear_bwd", portable_linear.linear_bwd)


@torch.library.register_fake("lsoftmax::loss_fwd", lib=library)
def _loss_fwd_fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int,
    lam: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    save: bool,
    class_chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = input.shape[0]
    dtype = accumulate_type(input.dtype)
    e_shape, e_dtype = portable.e_storage(input, linear_weight.shape[0], label_smoothing)
    return (
        input.new_empty([n] if reduction == NONE else [], dtype=dtype),
        input.new_empty(e_shape if save and class_chunk == 0 else [0], dtype=e_dtype),
        input.new_empty([5, n] if save else [0], dtype=dtype),
        input.new_empty([], dtype=dtype),
    )


@torch.library.register_fake("lsoftmax::loss_bwd", lib=library)
def _loss_bwd_fake(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None,
    e: Tensor,
    rows: Tensor,
    divisor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    class_chunk: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _gradients_fake(input, linear_weight, need_input, need_weight)


@torch.library.register_fake("lsoftmax::loss_and_gradients", lib=library)
def _loss_and_gradients_fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int,
    lam: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    row_chunk: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_type(input.dtype)
    dx, dw = _gradients_fake(input, linear_weight, need_input, need_weight)
    return input.new_empty([], dtype=dtype), dx.to(dtype), dw.to(dtype)


@torch.library.register_fake("lsoftmax::linear_fwd", lib=library)
def _linear_fwd_fake(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: Tensor
) -> tuple[Tensor, Tensor]:
    n = input.shape[0]
    return (
        input.new_empty([n, linear_weight.shape[0]]),
        input.new_empty([3, n], dtype=accumulate_type(input.dtype)),
    )


@torch.library.register_fake("lsoftmax::linear_bwd", lib=library)
def _linear_bwd_fake(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    coefficients: Tensor,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _gradients_fake(input, linear_weight, need_input, need_weight)


def _gradients_fake(
    input: Tensor, linear_weight: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(list(input.shape) if need_input else [0]),
        linear_weight.new_empty(list(linear_weight.shape) if need_weight else [0]),
    )


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


class _Loss(torch.autograd.Function):
    """loss_fwd with loss_bwd as its gradient. Saves only what it made, and changes none of it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        input, linear_weight, target, _, _, weight, *_ = args
        *_, ctx.ignore_index, ctx.label_smoothing, _save, ctx.class_chunk = args
        loss, e, rows, divisor = torch.ops.lsoftmax.loss_fwd(*args)
        ctx.save_for_backward(input, linear_weight, target, weight, e, rows, divisor)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        options = (ctx.ignore_index, ctx.label_smoothing, ctx.class_chunk)
        needed = ctx.needs_input_grad[:2]
        dx, dw = torch.ops.lsoftmax.loss_bwd(grad, *saved, *options, *needed)
        return _gradients(ctx, dx, dw, *saved[:2])


class _LossAndGradients(torch.autograd.Function):
    """loss_and_gradients: backward only scales what forward has formed, and keeps it as it was."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        loss, dx, dw = torch.ops.lsoftmax.loss_and_gradients(*args, *needed)
        ctx.save_for_backward(*args[:2], dx, dw)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, linear_weight, dx, dw = ctx.saved_tensors
        dx, dw = (dx * grad).to(input.dtype), (dw * grad).to(linear_weight.dtype)
        return _gradients(ctx, dx, dw, input, linear_weight)


class _Linear(torch.autograd.Function):
    """linear_fwd with linear_bwd as its gradient."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        logits, coefficients = torch.ops.lsoftmax.linear_fwd(*args)
        ctx.save_for_backward(*args[:3], coefficients)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        saved = ctx.saved_tensors
        dx, dw = torch.ops.lsoftmax.linear_bwd(grad, *saved, *needed)
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
) -> Tensor:
    """The fused loss of checked arguments, differentiable once in the two matrices."""
    args = (input, linear_weight, target, margin, lam, weight, reduction, ignore_index)
    if not (torch.is_grad_enabled() and (input.requires_grad or linear_weight.requires_grad)):
        options = (label_smoothing, False, plan.class_chunk)
        return torch.ops.lsoftmax.loss_fwd(*args, *options)[0]
    if plan.row_chunk:
        return _LossAndGradients.apply(*args, label_smoothing, plan.row_chunk)
    return _Loss.apply(*args, label_smoothing, True, plan.class_chunk)


def linear(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: Tensor
) -> Tensor:
    """The margin logits of checked arguments, differentiable once in the two matrices."""
    return _Linear.apply(input, linear_weight, target, margin, lam)
