"""The dispatcher's side: op schemas, their portable implementation, shapes for tracing.

The dispatcher is the fallback. Every op has its plain-torch implementation (``portable``,
``portable_linear``) on every device; the compiled extension, where it is loaded, registers a CUDA
implementation of the same ops, which then wins for CUDA tensors. Nothing else in the package asks
which one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _extension, portable, portable_classes, portable_linear, portable_schedule
from .margin import accumulate_type
from .memory import free_memory
from .rows import NONE

library = torch.library.Library("lsoftmax", "DEF")
library.define(
    "loss_fwd(Tensor input, Tensor linear_weight, Tensor target, int margin, Tensor lam, "
    "Tensor? weight, int reduction, int ignore_index, float label_smoothing, bool save, "
    "int class_chunk) -> (Tensor loss, Tensor e, Tensor rows, Tensor divisor, Tensor cosine)"
)
library.define(
    "loss_bwd(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, Tensor? weight, "
    "Tensor e, Tensor rows, Tensor divisor, int ignore_index, float label_smoothing, "
    "int class_chunk, bool need_input, bool need_weight) -> (Tensor, Tensor)"
)
library.define(
    "loss_and_gradients(Tensor input, Tensor linear_weight, Tensor target, int margin, Tensor lam, "
    "Tensor? weight, int reduction, int ignore_index, float label_smoothing, int row_chunk, "
    "bool need_input, bool need_weight) "
    "-> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor cosine)"
)
library.define(
    "linear_fwd(Tensor input, Tensor linear_weight, Tensor target, int margin, Tensor lam) "
    "-> (Tensor logits, Tensor coefficients, Tensor cosine)"
)
library.define(
    "linear_bwd(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, "
    "Tensor coefficients, bool need_input, bool need_weight) -> (Tensor, Tensor)"
)
library.define(
    "upcoming_lam(Tensor steps, Tensor share, float base, float gamma, float power, float minimum, "
    "float least_share) -> Tensor"
)
library.define(
    "anneal_(Tensor(a!) steps, Tensor(b!) lam, Tensor(c!) share, Tensor? next_lam, Tensor? cosine, "
    "int margin, float keep, float memory) -> ()"
)
library.define(
    "own_cosines(Tensor input, Tensor linear_weight, Tensor target, int ignore_index) -> Tensor"
)
library.define(
    "count_classes_(Tensor(a!) classes, Tensor cosines, Tensor target, float memory) -> Tensor"
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
            with torch.no_grad(), np.errstate(all="ignore"):  # NaN is no cause for words in torch
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
register_portable("own_cosines", portable_classes.own_cosines)
library.impl("count_classes_", portable_classes.count_classes_, "CompositeExplicitAutograd")
library.impl("upcoming_lam", portable_schedule.upcoming_lam, "CompositeExplicitAutograd")
library.impl("anneal_", portable_schedule.anneal_, "CompositeExplicitAutograd")


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = input.shape[0]
    dtype = accumulate_type(input.dtype)
    e_shape, e_dtype = portable.e_storage(input, linear_weight.shape[0], label_smoothing > 0)
    return (
        input.new_empty([n] if reduction == NONE else [], dtype=dtype),
        input.new_empty(e_shape if save and class_chunk == 0 else [0], dtype=e_dtype),
        input.new_empty([5, n] if save else [0], dtype=dtype),
        input.new_empty([], dtype=dtype),
        input.new_empty([], dtype=torch.float32),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_type(input.dtype)
    dx, dw = _gradients_fake(input, linear_weight, need_input, need_weight)
    loss, cosine = input.new_empty([], dtype=dtype), input.new_empty([], dtype=torch.float32)
    return loss, dx.to(dtype), dw.to(dtype), cosine


@torch.library.register_fake("lsoftmax::linear_fwd", lib=library)
def _linear_fwd_fake(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n = input.shape[0]
    return (
        input.new_empty([n, linear_weight.shape[0]]),
        input.new_empty([3, n], dtype=accumulate_type(input.dtype)),
        input.new_empty([], dtype=torch.float32),
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


@torch.library.register_fake("lsoftmax::upcoming_lam", lib=library)
def _upcoming_lam_fake(steps: Tensor, share: Tensor, *curve: float) -> Tensor:
    return torch.empty_like(share)


@torch.library.register_fake("lsoftmax::anneal_", lib=library)
def _anneal_fake(steps: Tensor, lam: Tensor, share: Tensor, *rest: Any) -> None:
    pass


@torch.library.register_fake("lsoftmax::own_cosines", lib=library)
def _own_cosines_fake(
    input: Tensor, linear_weight: Tensor, target: Tensor, ignore_index: int
) -> Tensor:
    return input.new_empty([input.shape[0]], dtype=torch.float32)


@torch.library.register_fake("lsoftmax::count_classes_", lib=library)
def _count_classes_fake(classes: Tensor, cosines: Tensor, target: Tensor, memory: float) -> Tensor:
    return classes.new_empty([])
