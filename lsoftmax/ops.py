"""The dispatcher's side: op schemas, their portable implementation, shapes for tracing, autograd.

The dispatcher is the fallback. Every op has its plain-torch implementation (``portable``) on every
device; the compiled extension, where it is loaded, registers a CUDA implementation of the same ops,
which then wins for CUDA tensors. Nothing else in the package asks which one runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _extension, portable
from .margin import accumulate_type

_library = torch.library.Library("lsoftmax", "DEF")
_library.define(
    "loss_fwd(Tensor input, Tensor linear_weight, Tensor target, int margin, Tensor lam, "
    "Tensor? weight, int reduction, int ignore_index, float label_smoothing, bool save) "
    "-> (Tensor loss, Tensor e, Tensor rows, Tensor divisor)"
)
_library.define(
    "loss_bwd(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, Tensor e, "
    "Tensor rows, Tensor divisor, int ignore_index, float label_smoothing, bool need_input, "
    "bool need_weight) -> (Tensor, Tensor)"
)
_library.define(
    "linear_fwd(Tensor input, Tensor linear_weight, Tensor target, int margin, Tensor lam) "
    "-> (Tensor logits, Tensor coefficients)"
)
_library.define(
    "linear_bwd(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, "
    "Tensor coefficients, bool need_input, bool need_weight) -> (Tensor, Tensor)"
)


def _register_portable(name: str) -> None:
    function = getattr(portable, name)

    def run(*args: Any) -> Any:
        device = args[
            1
        ].device.type  # the second argument of every op is a feature or weight matrix
        if device == "cuda":
            _extension.warn_once_no_kernels()
        with torch.no_grad():  # the gradient's formula is one level up
            if not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, enabled=False):  # the caller has chosen the types
                return function(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")


for _name in ("loss_fwd", "loss_bwd", "linear_fwd", "linear_bwd"):
    _register_portable(_name)


@torch.library.register_fake("lsoftmax::loss_fwd", lib=_library)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = input.shape[0]
    dtype = accumulate_type(input.dtype)
    e_shape, e_dtype = portable.e_storage(input, linear_weight.shape[0], label_smoothing)
    return (
        input.new_empty([n] if reduction == portable.NONE else [], dtype=dtype),
        input.new_empty(e_shape if save else [0], dtype=e_dtype),
        input.new_empty([4, n] if save else [0], dtype=dtype),
        input.new_empty([], dtype=dtype),
    )


@torch.library.register_fake("lsoftmax::loss_bwd", lib=_library)
def _loss_bwd_fake(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    e: Tensor,
    rows: Tensor,
    divisor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _gradients_fake(input, linear_weight, need_input, need_weight)


@torch.library.register_fake("lsoftmax::linear_fwd", lib=_library)
def _linear_fwd_fake(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: Tensor
) -> tuple[Tensor, Tensor]:
    n = input.shape[0]
    return (
        input.new_empty([n, linear_weight.shape[0]]),
        input.new_empty([3, n], dtype=accumulate_type(input.dtype)),
    )


@torch.library.register_fake("lsoftmax::linear_bwd", lib=_library)
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
    """Says that a gradient has no gradient, where it would silently count as a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "lsoftmax.functional is differentiable once; lsoftmax.reference, with the same "
            "signatures, is differentiable twice"
        )


def _gradients(ctx: Any, dx: Tensor, dw: Tensor, input: Tensor, linear_weight: Tensor) -> Any:
    """What backward returns: None for what was not asked for, and no second derivatives."""
    need_input, need_weight, *rest = ctx.needs_input_grad
    if torch.is_grad_enabled():  # create_graph=True
        dx, dw = (_Once.apply(gradient, input, linear_weight) for gradient in (dx, dw))
    return dx if need_input else None, dw if need_weight else None, *[None] * len(rest)


class _Loss(torch.autograd.Function):
    """loss_fwd with loss_bwd as its gradient. Saves only what it made, and changes none of it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        input, linear_weight, target = args[:3]
        loss, e, rows, divisor = torch.ops.lsoftmax.loss_fwd(*args, True)
        ctx.save_for_backward(input, linear_weight, target, e, rows, divisor)
        ctx.options = args[-2:]  # ignore_index, label_smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        saved = ctx.saved_tensors
        dx, dw = torch.ops.lsoftmax.loss_bwd(grad, *saved, *ctx.options, *needed)
        return _gradients(ctx, dx, dw, *saved[:2])


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
) -> Tensor:
    """The fused loss of checked arguments, differentiable once in the two matrices."""
    args = (input, linear_weight, target, margin, lam, weight, reduction, ignore_index)
    if torch.is_grad_enabled() and (input.requires_grad or linear_weight.requires_grad):
        return _Loss.apply(*args, label_smoothing)
    return torch.ops.lsoftmax.loss_fwd(*args, label_smoothing, False)[0]


def linear(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: Tensor
) -> Tensor:
    """The margin logits of checked arguments, differentiable once in the two matrices."""
    return _Linear.apply(input, linear_weight, target, margin, lam)
