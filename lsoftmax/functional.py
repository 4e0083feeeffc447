"""L-Softmax as functions: arguments are checked and brought to one type, then go to the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, reference
from .checks import (
    REDUCTIONS,
    check_class_weight,
    check_constant,
    check_dense,
    check_device,
    check_features,
    check_ignore_index,
    check_loss_options,
    check_margin,
    check_matrices,
    check_memory_budget,
    is_transformed,
    kind,
    lam_tensor,
)
from .margin import accumulate_type
from .plan import Plan, choose

__all__ = ["lsoftmax_linear", "lsoftmax_loss", "plan", "psi"]


def psi(cos_theta: Tensor, margin: int) -> Tensor:
    r"""The function that replaces the target's cosine: :math:`(-1)^k \cos(m\theta) - 2k`.

    The same as :func:`lsoftmax.reference.psi`, with its arguments checked. Differentiable.

    Args:
        cos_theta: cosines, any shape, floating point.
        margin: integer m >= 1.

    Returns:
        A tensor of the shape and type of ``cos_theta``, in [1 - 2m, 1].

    Raises:
        TypeError: ``cos_theta`` is no floating-point tensor, or ``margin`` is no integer.
        ValueError: ``margin`` < 1, or > 1000.
    """
    if not isinstance(cos_theta, Tensor) or not cos_theta.is_floating_point():
        raise TypeError(f"cos_theta: expected a floating-point tensor, got {kind(cos_theta)}")
    check_dense("cos_theta", cos_theta)
    return reference.psi(cos_theta, check_margin(margin))


def lsoftmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int = 4,
    lam: float | Tensor = 0.0,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Large-Margin Softmax loss, fused: cross-entropy of ``input @ linear_weight.T`` with the
    target's logit replaced by

    .. math:: f_i = \frac{\lambda\, x_i \cdot w_{y_i} + |x_i||w_{y_i}|\,\psi(\theta_i)}{1 + \lambda}

    (Liu et al., ICML 2016, equations 4 to 6 and section 5.1). With ``margin=1`` it is
    :func:`torch.nn.functional.linear_cross_entropy`. Once differentiable in ``input`` and
    ``linear_weight``; for second derivatives use :func:`lsoftmax.reference.lsoftmax_loss`.

    Under autocast the matrix products run in the autocast type, the rest in float32.

    Args:
        input: (N, D) or (D,): features, float32, float64, float16 or bfloat16.
        linear_weight: (C, D): one row per class, the type and device of ``input``.
        target: (N,) or (): int64 class indices in [0, C), or ``ignore_index``.
        margin: integer m >= 1.
        lam: annealing weight of the plain logit, >= 0 and finite: a number, or a 0-dim float32
            tensor on the device of ``input`` (not looked at, so never a synchronisation).
        weight: (C,) class weights, as in :func:`torch.nn.functional.cross_entropy`.
        reduction: ``"mean"`` (over the kept targets' weights), ``"sum"`` or ``"none"``.
        ignore_index: the target whose rows count for nothing; None is -100.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        memory_budget: bytes that what is N x C may take; None: a quarter of the memory that is free
            or, without asking, 64 MB or a 256th of a GPU. Where it is not enough, or a CPU is
            faster so, the loss is computed in chunks (:func:`lsoftmax.functional.plan` says how).
            The last bits of the result depend on the chunks: give a budget where they must repeat
            on a machine with other things to do. ``torch.export`` chooses by a budget only, which
            binds the program to numbers of rows; without, nothing is in chunks.

    Returns:
        The loss, float32 (float64 for float64 input): scalar, or the shape of ``target`` for
        ``reduction="none"``. Gradients have the types of ``input`` and ``linear_weight``.

    Raises:
        TypeError: an argument of the wrong type, or tensors whose types differ.
        RuntimeError: ``weight`` or ``lam`` requires a gradient, which there is none of.
        ValueError: wrong number of dimensions, shape, device or value.
        IndexError: a target outside [0, C), on a CPU; on CUDA the device asserts, as it does for
            :func:`torch.nn.functional.cross_entropy`.
    """
    return loss_and_cosine(
        input,
        linear_weight,
        target,
        margin,
        lam,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        memory_budget=memory_budget,
    )[0]


def loss_and_cosine(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int,
    lam: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`lsoftmax_loss`, and what annealing by angle goes by: the cosine between the kept rows
    and their class vectors, its mean less one standard deviation; 0-dim float32, inf without any
    row, no gradient.
    """
    input, linear_weight = autocast(input, linear_weight)
    check_matrices(input, linear_weight, target)
    check_constant("lam", lam)
    margin, lam = check_margin(margin), lam_tensor(lam, input)
    check_loss_options(reduction, label_smoothing)
    ignore_index = check_ignore_index(ignore_index)
    memory_budget = check_memory_budget(memory_budget)
    if weight is not None:
        check_class_weight(weight, linear_weight.shape[0])
        check_device("weight", weight, input)
        check_constant("weight", weight)
        weight = weight.to(accumulate_type(input.dtype)).contiguous()
    if is_transformed():
        loss = reference.lsoftmax_loss(
            *(input, linear_weight, target, margin, lam),
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        return loss, _unmeasured(input)

    rows, targets = as_batch(input, target)
    loss, cosine = autograd.loss(
        rows,
        linear_weight,
        targets,
        margin,
        lam,
        weight,
        REDUCTIONS[reduction],
        ignore_index,
        float(label_smoothing),
        _plan(rows, linear_weight, reduction, memory_budget, label_smoothing),
    )
    return loss.reshape(target.shape) if reduction == "none" else loss, cosine


def plan(
    input: Tensor,
    linear_weight: Tensor,
    reduction: str = "mean",
    memory_budget: int | None = None,
    label_smoothing: float = 0.0,
) -> Plan:
    """How :func:`lsoftmax_loss` would compute the loss of these arguments now.

    Args:
        input, linear_weight, reduction, memory_budget, label_smoothing: as for
            :func:`lsoftmax_loss`.

    Returns:
        ``class_chunk``: classes a chunk, with the exponentials made again in backward (8 N C D
        flops in all). ``row_chunk``: rows a chunk, with the gradients formed in forward (6 N C D).
        Both 0: the N x C exponentials are kept (6 N C D). ``bytes``: what that takes.

    Raises:
        TypeError, ValueError: as :func:`lsoftmax_loss`.
    """
    input, linear_weight = autocast(input, linear_weight)
    check_features(input, linear_weight)
    check_loss_options(reduction, label_smoothing)
    memory_budget = check_memory_budget(memory_budget)
    rows = input if input.dim() == 2 else input.unsqueeze(0)
    return _plan(rows, linear_weight, reduction, memory_budget, label_smoothing)


def _plan(
    rows: Tensor,
    linear_weight: Tensor,
    reduction: str,
    memory_budget: int | None,
    label_smoothing: float,
) -> Plan:
    if memory_budget is None and torch.compiler.is_exporting():
        return Plan(0, 0, 0)  # of any size: a choice would bind the program to those it was made by
    return choose(
        rows.shape[0],
        rows.shape[1],
        linear_weight.shape[0],
        rows.dtype,
        rows.device,
        scalar=reduction != "none",
        needs_grad=torch.is_grad_enabled() and (rows.requires_grad or linear_weight.requires_grad),
        memory_budget=memory_budget,
        fusable=label_smoothing == 0,
    )


def lsoftmax_linear(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int = 4,
    lam: float | Tensor = 0.0,
) -> Tensor:
    """Logits ``input @ linear_weight.T`` with the target's replaced by its margin logit.

    For losses of one's own on top; :func:`lsoftmax_loss` is faster and needs less memory. The other
    logits are bit for bit those of :func:`torch.nn.functional.linear`. Once differentiable.

    Args:
        input: (N, D) or (D,): features, float32, float64, float16 or bfloat16.
        linear_weight: (C, D): one row per class, the type and device of ``input``.
        target: (N,) or (): int64 class indices in [0, C).
        margin: integer m >= 1.
        lam: annealing weight of the plain logit, as in :func:`lsoftmax_loss`.

    Returns:
        (N, C) or (C,) logits in the type of ``input`` (under autocast, the autocast type).

    Raises:
        TypeError, ValueError, IndexError: as :func:`lsoftmax_loss`.
    """
    return logits_and_cosine(input, linear_weight, target, margin, lam)[0]


def logits_and_cosine(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`lsoftmax_linear`, and the low cosine, as of :func:`loss_and_cosine`."""
    input, linear_weight = autocast(input, linear_weight)
    check_matrices(input, linear_weight, target)
    check_constant("lam", lam)
    margin, lam = check_margin(margin), lam_tensor(lam, input)
    if is_transformed():
        logits = reference.lsoftmax_linear(input, linear_weight, target, margin, lam)
        return logits, _unmeasured(input)
    rows, targets = as_batch(input, target)
    logits, cosine = autograd.linear(rows, linear_weight, targets, margin, lam)
    return logits.reshape(*target.shape, linear_weight.shape[0]), cosine


def autocast(input: Tensor, linear_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast, what F.linear would multiply; differentiable casts, so gradients go back."""
    if not (isinstance(input, Tensor) and isinstance(linear_weight, Tensor)):
        return input, linear_weight
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return input, linear_weight
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.float16, torch.bfloat16)  # autocast leaves float64 alone
    if input.dtype not in castable or linear_weight.dtype not in castable:
        return input, linear_weight
    return input.to(dtype), linear_weight.to(dtype)


def _unmeasured(input: Tensor) -> Tensor:
    """The low cosine under a transform, where nothing can anneal: it would change itself."""
    return torch.zeros((), device=input.device)


def as_batch(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A row alone as a batch of one."""
    if input.dim() == 2:
        return input, target
    return input.unsqueeze(0), target.unsqueeze(0)
