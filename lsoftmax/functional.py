"""L-Softmax as functions: arguments are checked and brought to one type, then go to the ops."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from . import ops, reference
from .margin import accumulate_type
from .plan import Plan, choose
from .rows import MEAN, NONE, SUM

__all__ = ["lsoftmax_linear", "lsoftmax_loss", "plan", "psi"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


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
        ValueError: ``margin`` < 1.
    """
    if not isinstance(cos_theta, Tensor) or not cos_theta.is_floating_point():
        raise TypeError(f"cos_theta: expected a floating-point tensor, got {_kind(cos_theta)}")
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
    ignore_index: int = -100,
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
        ignore_index: the target whose rows count for nothing.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        memory_budget: bytes that what is N x C may take; None: a quarter of the memory that is free
            when it is more than 64 MB. Where it is not enough the loss is computed in chunks
            (:func:`lsoftmax.functional.plan` says how). The last bits of the result depend on the
            chunks: give a budget where they must repeat on a machine with other things to do.

    Returns:
        The loss, float32 (float64 for float64 input): scalar, or the shape of ``target`` for
        ``reduction="none"``. Gradients have the types of ``input`` and ``linear_weight``.

    Raises:
        TypeError: an argument of the wrong type, or tensors whose types differ.
        ValueError: wrong number of dimensions, shape, device or value.
        IndexError: a target outside [0, C), on a CPU; on CUDA the device asserts, as it does for
            :func:`torch.nn.functional.cross_entropy`.
    """
    input, linear_weight = _autocast(input, linear_weight)
    _check_matrices(input, linear_weight, target)
    margin, lam = check_margin(margin), _lam_tensor(lam, input)
    check_loss_options(reduction, ignore_index, label_smoothing)
    check_memory_budget(memory_budget)
    if weight is not None:
        check_class_weight(weight, linear_weight.shape[0])
        _check_device("weight", weight, input)
        weight = weight.to(accumulate_type(input.dtype)).contiguous()

    rows, targets = _as_batch(input, target)
    loss = ops.loss(
        rows,
        linear_weight,
        targets,
        margin,
        lam,
        weight,
        _REDUCTIONS[reduction],
        ignore_index,
        float(label_smoothing),
        _plan(rows, linear_weight, reduction, memory_budget),
    )
    return loss.reshape(target.shape) if reduction == "none" else loss


def plan(
    input: Tensor,
    linear_weight: Tensor,
    reduction: str = "mean",
    memory_budget: int | None = None,
) -> Plan:
    """How :func:`lsoftmax_loss` would compute the loss of these arguments now.

    Args:
        input, linear_weight, reduction, memory_budget: as for :func:`lsoftmax_loss`.

    Returns:
        ``class_chunk``: classes a chunk, with the exponentials made again in backward (8 N C D
        flops in all). ``row_chunk``: rows a chunk, with the gradients formed in forward (6 N C D).
        Both 0: the N x C exponentials are kept (6 N C D). ``bytes``: what that takes.
    """
    input, linear_weight = _autocast(input, linear_weight)
    return _plan(input.reshape(-1, input.shape[-1]), linear_weight, reduction, memory_budget)


def _plan(rows: Tensor, linear_weight: Tensor, reduction: str, memory_budget: int | None) -> Plan:
    return choose(
        rows.shape[0],
        rows.shape[1],
        linear_weight.shape[0],
        rows.dtype,
        rows.device,
        scalar=reduction != "none",
        needs_grad=torch.is_grad_enabled() and (rows.requires_grad or linear_weight.requires_grad),
        memory_budget=memory_budget,
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
    input, linear_weight = _autocast(input, linear_weight)
    _check_matrices(input, linear_weight, target)
    margin, lam = check_margin(margin), _lam_tensor(lam, input)
    rows, targets = _as_batch(input, target)
    logits = ops.linear(rows, linear_weight, targets, margin, lam)
    return logits.reshape(*target.shape, linear_weight.shape[0])


def check_margin(margin: int) -> int:
    """The margin as an int; TypeError or ValueError where it is none or < 1."""
    if isinstance(margin, bool) or not hasattr(margin, "__index__"):
        raise TypeError(f"margin: expected an integer >= 1, got {_kind(margin)} ({margin!r})")
    if operator.index(margin) < 1:
        raise ValueError(f"margin: expected an integer >= 1, got {margin}")
    return operator.index(margin)


def check_lam(lam: float) -> float:
    """A constant lam as a float; TypeError or ValueError unless it is finite and >= 0."""
    if isinstance(lam, bool) or not isinstance(lam, (int, float)):
        raise TypeError(f"lam: expected a number >= 0, got {_kind(lam)}")
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam: expected a finite number >= 0, got {lam}")
    return float(lam)


def check_loss_options(reduction: str, ignore_index: int, label_smoothing: float) -> None:
    """TypeError or ValueError unless these are what F.cross_entropy takes."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {list(_REDUCTIONS)}, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {_kind(ignore_index)}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(
            f"label_smoothing: expected a number in [0, 1], got {_kind(label_smoothing)}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")


def check_memory_budget(memory_budget: int | None) -> None:
    """TypeError or ValueError unless it is None or a number of bytes."""
    if memory_budget is None:
        return
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f"memory_budget: expected bytes or None, got {_kind(memory_budget)}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget: expected a positive number of bytes, got {memory_budget}")


def check_class_weight(weight: Tensor, num_classes: int) -> None:
    """TypeError or ValueError unless ``weight`` is a (C,) floating-point tensor."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor or None, got {_kind(weight)}")
    if weight.shape != (num_classes,):
        raise ValueError(
            f"weight: expected one per class, shape ({num_classes},), got {tuple(weight.shape)}"
        )


def _autocast(input: Tensor, linear_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast, what F.linear would multiply; differentiable casts, so gradients go back."""
    if not (isinstance(input, Tensor) and isinstance(linear_weight, Tensor)):
        return input, linear_weight
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return input, linear_weight
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.float16, torch.bfloat16)  # autocast leaves float64 alone
    if input.dtype not in castable or linear_weight.dtype not in castable:
        return input, linear_weight
    return input.to(dtype), linear_weight.to(dtype)


def _check_matrices(input: Tensor, linear_weight: Tensor, target: Tensor) -> None:
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_kind(tensor)}")
    if input.dtype not in _FLOATS:
        raise TypeError(
            f"input: expected float32, float64, float16 or bfloat16, got {_kind(input)}"
        )
    if linear_weight.dtype != input.dtype:
        raise TypeError(
            f"linear_weight: expected the type of input ({input.dtype}), got {linear_weight.dtype}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 class indices, got {_kind(target)}")
    if input.dim() not in (1, 2):
        raise ValueError(f"input: expected shape (N, D) or (D,), got {tuple(input.shape)}")
    if linear_weight.dim() != 2 or linear_weight.shape[0] == 0:
        raise ValueError(
            f"linear_weight: expected shape (C, D) with C >= 1, got {tuple(linear_weight.shape)}"
        )
    if linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight: expected (C, {input.shape[-1]}) for input {tuple(input.shape)}, "
            f"got {tuple(linear_weight.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target: expected shape {tuple(input.shape[:-1])} for input {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
    _check_device("linear_weight", linear_weight, input)
    _check_device("target", target, input)


def _as_batch(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if input.dim() == 2:
        return input, target
    return input.unsqueeze(0), target.unsqueeze(0)


def _lam_tensor(lam: float | Tensor, input: Tensor) -> Tensor:
    """lam as the 0-dim float32 tensor that the kernels read on the device."""
    if not isinstance(lam, Tensor):
        return torch.full((), check_lam(lam), dtype=torch.float32, device=input.device)
    if lam.dim() != 0 or not lam.is_floating_point():
        raise TypeError(f"lam: expected a number or a 0-dim float tensor, got {_kind(lam)}")
    _check_device("lam", lam, input)
    return lam.detach().to(torch.float32)


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected on {input.device} like input, got {tensor.device}")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__
