"""The ops in plain torch, for every machine: the E form of the loss, and the margin logits.

The forward pass turns the logits in place into what backward needs, so that backward is two matrix
products. Per row i, with f the margin logit of the target y and z the logits of the others:

    r  >= max(f, max z)             the row's reference: keeps every exponential in range
    E_j = exp(z_j - r)              j != y
    So = sum of E_j                 L = log So + r          S = So + exp(f - r)
    loss = softplus(L - f)          p_y - 1 = t = -sigmoid(L - f)        exact as p_y -> 1
    E_y = t S alpha = -So alpha     so that  diag(v) E W  holds the target's part too, v = g / S

and the norms' share of the margin (beta, gamma of ``margin_terms``) is one multiple of x_i and one
of w_y a row. Near the class vector alpha w_y and beta x nearly cancel (alpha is up to m^2): where
E is narrower than its row's numbers, its target column is 0 and the target's part is added apart.
Class weights and label smoothing change three numbers a row: with q the smoothed target
distribution, dz_j = g (A p_j - q_j), where A = sum of q (``_row_terms``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .margin import Vector, accumulate_type, margin_terms, namespace, stacked, vector

NONE, MEAN, SUM = range(3)  # reductions, numbered as in ATen

# The row pass goes over the logits in blocks of this many (16 MB), which stay in a last-level cache
# between its steps. Not less: each step of each block is a barrier for torch's threads.
_BLOCK_LOGITS = 1 << 22

# Classes a matrix product of the forward pass takes on a CPU: MKL is 10 to 15% faster on panels of
# 512 to 2,000 rows of W than on 10^4 to 10^5 of them.
_PANEL_CLASSES = 1024

# So few that numpy, on one core, is done before torch has called its threads.
_FEW_LOGITS = 1 << 14


def e_storage(
    input: Tensor, num_classes: int, label_smoothing: float
) -> tuple[list[int], torch.dtype]:
    """Shape and type of E, the one N x C array that is kept for backward.

    bfloat16 input keeps E in bfloat16 (relative precision is all E needs), its rows padded to 16
    bytes, as matrix units want them. float16 has not the range of an exponential: E is float32.
    With label smoothing one more row holds the class weights: the constant part of the smoothed
    gradient has rank one, and as a row of E it costs no pass of its own.
    """
    rows = input.shape[0] + (1 if label_smoothing > 0 else 0)
    if input.dtype == torch.bfloat16:
        return [rows, (num_classes + 7) // 8 * 8], torch.bfloat16
    return [rows, num_classes], accumulate_type(input.dtype)


def _valid_targets(
    target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Targets with 0 in the ignored places, and which ones are kept (None: all).

    Raises IndexError, as F.cross_entropy does, for a target outside [0, C) on a CPU; on a GPU
    looking would stop the device, and the lookups that follow assert on the device instead.
    """
    if target.device.type == "cpu" and target.numel() > 0:
        low, high = (int(bound) for bound in target.aminmax())
        if low >= 0 and high < num_classes and not low <= ignore_index <= high:
            return target, None
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    if target.device.type == "cpu":
        outside = (index < 0) | (index >= num_classes)
        if bool(outside.any()):
            raise IndexError(
                f"target {int(target[outside][0])} is out of bounds: expected 0 <= target < "
                f"{num_classes} or ignore_index={ignore_index}"
            )
    return index, kept


def loss_fwd(
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
    """The loss; for backward (where ``save``) E and four numbers a row; the mean's divisor."""
    n, num_classes = input.shape[0], linear_weight.shape[0]
    dtype = accumulate_type(input.dtype)
    index, kept = _valid_targets(target, num_classes, ignore_index)
    e_shape, e_dtype = e_storage(input, num_classes, label_smoothing if save else 0.0)
    in_place = e_dtype == dtype
    z_all = input.new_empty(e_shape if in_place else [n, num_classes], dtype=dtype)
    z = z_all[:n] if z_all.shape[0] > n else z_all
    _logits(input.to(dtype), linear_weight.to(dtype), z)
    column = index.unsqueeze(1)
    plain = z.gather(1, column).squeeze(1)
    f, alpha, beta, gamma = margin_terms(input, linear_weight, index, margin, lam, plain)
    z_sum = None
    if label_smoothing > 0:
        z.scatter_(1, column, 0.0)
        z_sum = vector(z.sum(1) if weight is None else torch.mv(z, weight))
    z.scatter_(1, column, -math.inf)
    r, e_sum = _exponentials(z, torch.as_tensor(f).to(dtype))

    xp = namespace(input)
    with np.errstate(divide="ignore"):  # without another class, log 0
        gap = xp.log(e_sum) + r - f  # L - f
    log_p = xp.where(gap < 0, 0.0, -gap) - xp.log1p(xp.exp(-abs(gap)))  # -softplus(gap)
    t = xp.expm1(log_p)
    row_loss, target_gradient, a_total, constant = _row_terms(
        f, log_p, t, z_sum, index, weight, num_classes, label_smoothing
    )
    if kept is not None:
        kept_rows = kept.numpy() if xp is np else kept
        row_loss = xp.where(kept_rows, row_loss, 0.0)
    loss, divisor = _reduce(row_loss, index, kept, weight, reduction, dtype)
    if not save:
        return loss, input.new_empty(0, dtype=e_dtype), input.new_empty(0, dtype=dtype), divisor

    scale = a_total * xp.exp(r - f + log_p)  # A / S
    # The target's part of dX and dW, the constant part of column y taken back.
    target_share = target_gradient * alpha + constant
    columns = (scale, target_gradient * beta, target_gradient * gamma, target_share)
    rows = stacked(columns, dtype)
    if in_place:  # into E, in units of its scale
        e_y = target_share / xp.where(scale == 0, 1.0, scale)
        z.scatter_(1, column, torch.as_tensor(e_y).to(dtype).unsqueeze(1))
    if kept is not None:
        rows.masked_fill_(~kept, 0.0)
        z.masked_fill_(~kept.unsqueeze(1), 0.0)  # what is ignored may be NaN: 0 * NaN is not 0
    e = z_all
    if not in_place:
        e = input.new_zeros(e_shape, dtype=e_dtype)
        e[:n, :num_classes] = z
    if label_smoothing > 0:
        e[n, :num_classes] = 1.0 if weight is None else weight
    return loss, e, rows, divisor


def _logits(x: Tensor, w: Tensor, out: Tensor) -> None:
    """x @ w.T; on a CPU a panel of classes at a time, which then stays in cache."""
    panel = w.shape[0] if x.device.type != "cpu" else _PANEL_CLASSES
    for columns, classes in zip(out.split(panel, dim=1), w.split(panel), strict=True):
        torch.mm(x, classes.t(), out=columns)


def _exponentials(z: Tensor, f: Tensor) -> tuple[Vector, Vector]:
    """z <- exp(z - r), in place; r = max(f, max z) and the sums of the rows."""
    on_cpu = z.device.type == "cpu"  # elsewhere a block is launches, and saves nothing
    if on_cpu and z.numel() <= _FEW_LOGITS:
        return _exponentials_of(z.numpy(), f.numpy(), np)
    block = max(1, _BLOCK_LOGITS // z.shape[1] if on_cpu else z.shape[0])
    blocks = zip(z.split(block), f.split(block), strict=True)
    r, e_sum = zip(*(_exponentials_of(*rows, torch) for rows in blocks), strict=True)
    return vector(torch.cat(r)), vector(torch.cat(e_sum))


def _exponentials_of(z: Any, f: Any, xp: Any) -> tuple[Any, Any]:
    r = xp.maximum(xp.amax(z, 1), f)
    xp.subtract(z, r[:, None], out=z)
    return r, xp.sum(xp.exp(z, out=z), 1)


def _row_terms(
    f: Vector,
    log_p: Vector,
    t: Vector,
    z_sum: Vector | None,
    index: Tensor,
    weight: Tensor | None,
    num_classes: int,
    label_smoothing: float,
) -> tuple[Vector, Vector, Vector | float, Vector | float]:
    """Per row: the loss; dz_y / g = A p_y - q_y; A; the constant part of column y.

    q_j = (1 - eps) w_y [j = y] + eps / C w_j, so A = (1 - eps) w_y + eps / C sum of w, and with
    p_y = 1 + t the gradient A p_y - q_y = A t + eps / C (sum of w - w_y) has no cancellation.
    """
    w_y = 1.0 if weight is None else vector(weight.index_select(0, index))
    if label_smoothing == 0:
        return -w_y * log_p, w_y * t, w_y, 0.0
    assert z_sum is not None
    share = label_smoothing / num_classes
    w_sum = num_classes if weight is None else vector(weight.sum())
    a_total = (1 - label_smoothing) * w_y + share * w_sum
    uniform = w_sum * (f - log_p) - z_sum - w_y * f
    row_loss = share * uniform - (1 - label_smoothing) * w_y * log_p
    return row_loss, a_total * t + share * (w_sum - w_y), a_total, share * w_y


def _reduce(
    row_loss: Vector,
    index: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The loss and what divided it: the sum of the kept targets' weights for a mean, else 1."""
    one = torch.ones((), dtype=dtype, device=index.device)
    if reduction == NONE:
        return torch.as_tensor(row_loss).to(dtype), one
    total = row_loss.sum()
    if isinstance(row_loss, np.ndarray):
        total = torch.full((), float(total), dtype=dtype)
    if reduction == SUM:
        return total.to(dtype), one
    if weight is not None:
        w_y = weight.index_select(0, index).double()
        divisor = (w_y if kept is None else torch.where(kept, w_y, 0.0)).sum().to(dtype)
    else:
        divisor = one.fill_(index.shape[0]) if kept is None else kept.sum().to(dtype)
    return (total / divisor).to(dtype), divisor


def loss_bwd(
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
    """Gradients of ``input`` and ``linear_weight``; an empty tensor for one that is not needed."""
    n, num_classes = input.shape[0], linear_weight.shape[0]
    dtype = rows.dtype
    x, w = input.to(dtype), linear_weight.to(dtype)
    index, kept = _valid_targets(target, num_classes, ignore_index)
    g = grad / divisor
    if kept is not None:
        x = torch.where(kept.unsqueeze(1), x, 0.0)
        g = torch.where(kept, g, 0.0)  # after the division: of no kept rows it is NaN
    scale, input_share, weight_share, target_share = (g * rows).unbind()
    others = None if e.dtype == dtype else target_share  # None: it is in E
    e_rows = e if e.shape == (n, num_classes) else e[:n, :num_classes]
    e_rows = e_rows.to(dtype)
    scale_e = num_classes < input.shape[1]  # scale the smaller factor: E, or X
    if scale_e:
        e_rows = e_rows * scale.unsqueeze(1)
    constant = None
    if label_smoothing > 0:
        constant = e[n, :num_classes].to(dtype), (g * (-label_smoothing / num_classes)).expand(n)

    grad_input = grad_weight = input.new_empty(0)
    if need_weight:  # first: its temporaries take the room that dX will
        dw = torch.mm(e_rows.t(), x if scale_e else x * scale.unsqueeze(1))
        if constant is not None:
            dw.addr_(constant[0], torch.mv(x.t(), constant[1]))
        dw = add_class_shares(dw, x, w, index, weight_share, others)
        grad_weight = dw.to(linear_weight.dtype)
    if need_input:
        dx = torch.mm(e_rows, w)
        if not scale_e:
            dx.mul_(scale.unsqueeze(1))
        if constant is not None:
            dx.addr_(constant[1], torch.mv(w.t(), constant[0]))
        grad_input = add_shares(dx, x, w, index, input_share, others).to(input.dtype)
    return grad_input, grad_weight


def add_shares(
    dx: Tensor, x: Tensor, w: Tensor, target: Tensor, own: Tensor, others: Tensor | None
) -> Tensor:
    """dx_i += own_i x_i + others_i w_y."""
    dx.addcmul_(x, own.unsqueeze(1))
    if others is not None:
        dx.addcmul_(w.index_select(0, target), others.unsqueeze(1))
    return dx


def add_class_shares(
    dw: Tensor, x: Tensor, w: Tensor, target: Tensor, own: Tensor, others: Tensor | None
) -> Tensor:
    """dw_c += sum over {i: y_i = c} of own_i w_c + others_i x_i; touches the targets' rows only."""
    if others is not None:
        dw.index_add_(0, target, x * others.unsqueeze(1))
    if w.shape[0] <= target.shape[0]:
        h = own.new_zeros(w.shape[0]).index_add_(0, target, own)
        return dw.addcmul_(w, h.unsqueeze(1))
    return dw.index_add_(0, target, w.index_select(0, target).mul_(own.unsqueeze(1)))


def linear_fwd(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """Margin logits (N, C), and alpha, beta, gamma of each row for backward, (3, N)."""
    index, _ = _valid_targets(target, linear_weight.shape[0], ignore_index=-1 - 2**62)
    logits = torch.nn.functional.linear(input, linear_weight)
    plain = None
    if logits.dtype == accumulate_type(input.dtype):  # else rounded to 16 bits
        plain = logits.gather(1, index.unsqueeze(1)).squeeze(1)
    f, *coefficients = margin_terms(input, linear_weight, index, margin, lam, plain)
    logits.scatter_(1, index.unsqueeze(1), torch.as_tensor(f).to(logits.dtype).unsqueeze(1))
    return logits, stacked(coefficients, accumulate_type(input.dtype))


def linear_bwd(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    coefficients: Tensor,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``input`` and ``linear_weight``; an empty tensor for one that is not needed."""
    dtype = coefficients.dtype
    x, w = input.to(dtype), linear_weight.to(dtype)
    alpha, beta, gamma = coefficients
    g = grad.to(dtype)
    g_y = g.gather(1, target.unsqueeze(1)).squeeze(1)
    rest = g_y * (alpha - 1)  # the products hold the target with a slope of 1

    grad_input = grad_weight = input.new_empty(0)
    if need_input:
        dx = add_shares(torch.mm(g, w), x, w, target, g_y * beta, rest)
        grad_input = dx.to(input.dtype)
    if need_weight:
        dw = add_class_shares(torch.mm(g.t(), x), x, w, target, g_y * gamma, rest)
        grad_weight = dw.to(linear_weight.dtype)
    return grad_input, grad_weight
