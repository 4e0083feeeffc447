"""What the fused loss has per row: targets, the loss itself, and backward's five numbers.

With f the margin logit of the target, z the logits of the others and r a reference near max z:

    So = sum over j != y of exp(z_j - r)        L = log So + r        S = So + exp(f - r)
    loss = softplus(L - f)          p_y - 1 = t = -sigmoid(L - f)        exact as p_y -> 1

Class weights and label smoothing change three numbers a row: with q the smoothed target
distribution, dz_j = g (A p_j - q_j), where A = sum of q and g is the upstream gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .margin import Vector, namespace, stacked, vector
from .panels import RowSums

NONE, MEAN, SUM = range(3)  # reductions, numbered as in ATen
NO_INDEX = -1 - 2**62  # an ignore_index for what ignores nothing


class RowTerms(NamedTuple):
    """Of each row: the loss, and what backward multiplies by the upstream gradient."""

    loss: Vector
    scale: Vector  # A / S: of the row's exponentials
    input_share: Vector  # of x_i in dx_i: the norms' share of the margin
    weight_share: Vector  # of w_y in dw_y
    target_share: Vector  # of w_y in dx_i and of x_i in dw_y, column y of what is smoothed included


def valid_targets(
    target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Targets with 0 in the ignored places, and which ones are kept (None: all).

    Raises IndexError, as F.cross_entropy does, for a target outside [0, C) on a CPU; on a GPU
    looking would stop the device, and the lookups that follow assert on the device instead.
    """
    if target.device.type == "cpu" and target.numel() > 0:
        numbers = target.numpy()
        low, high = int(numbers.min()), int(numbers.max())
        if low >= 0 and high < num_classes and not low <= ignore_index <= high:
            return target, None
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    if target.device.type == "cpu":
        outside = (index < 0) | (index >= num_classes)
        if bool(outside.any()):
            ignored = "" if ignore_index == NO_INDEX else f" or ignore_index={ignore_index}"
            raise IndexError(
                f"target {int(target[outside][0])} is out of bounds: expected 0 <= target < "
                f"{num_classes}{ignored}"
            )
    return index, kept


@np.errstate(all="ignore")  # without another class there is log 0, and torch has no words for NaN
def row_terms(
    margin_terms: Sequence[Vector],
    sums: RowSums,
    index: Tensor,
    num_classes: int,
    weight: Tensor | None,
    label_smoothing: float,
) -> RowTerms:
    """The loss and its gradient from the margin (f, alpha, beta, gamma) and the sums of each row.

    q_j = (1 - eps) w_y [j = y] + eps / C w_j, so A = (1 - eps) w_y + eps / C sum of w, and with
    p_y = 1 + t the gradient A p_y - q_y = A t + eps / C (sum of w - w_y) has no cancellation.
    """
    f, alpha, beta, gamma = margin_terms
    xp = namespace(index)
    gap = xp.log(sums.others) + sums.reference - f  # L - f; -inf without another class
    log_p = xp.where(gap < 0, 0.0, -gap) - xp.log1p(xp.exp(-abs(gap)))  # -softplus(gap)
    t = xp.expm1(log_p)

    w_y = 1.0 if weight is None else vector(weight.index_select(0, index))
    constant = 0.0
    if sums.weighted is None:
        loss, target_gradient, total = -w_y * log_p, w_y * t, w_y
    else:
        share = label_smoothing / num_classes
        w_sum = num_classes if weight is None else vector(weight.sum())
        total = (1 - label_smoothing) * w_y + share * w_sum
        uniform = w_sum * (f - log_p) - sums.weighted - w_y * f
        loss = share * uniform - (1 - label_smoothing) * w_y * log_p
        target_gradient = total * t + share * (w_sum - w_y)
        constant = share * w_y  # of column y, taken back from the target's part
    # A / S, S = So (1 + exp(-gap)): where the gap is huge, log So is lost in it.
    by_others = total / (sums.others * (1.0 + xp.exp(-gap)))
    scale = xp.where(gap > 0, by_others, total * xp.exp(sums.reference - f + log_p))
    shares = (target_gradient * beta, target_gradient * gamma, target_gradient * alpha + constant)
    return RowTerms(loss, scale, *shares)


def saved_rows(
    terms: RowTerms, reference: Vector, kept: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(5, N), for backward: scale, the three shares and the reference; 0 in the ignored rows."""
    rows = stacked((*terms[1:], reference), dtype)
    return rows if kept is None else rows.masked_fill_(~kept, 0.0)


def reduce(
    row_loss: Vector,
    index: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The loss, and what divided it."""
    if kept is not None:
        row_loss = namespace(index).where(_mask(kept, row_loss), row_loss, 0.0)
    divisor = divisor_of(index, kept, weight, reduction, dtype)
    if reduction == NONE:
        return torch.as_tensor(row_loss).to(dtype), divisor
    total = row_loss.sum()
    if isinstance(row_loss, np.ndarray):
        total = torch.full((), float(total), dtype=torch.float64)
    return (total if reduction == SUM else total / divisor).to(dtype), divisor


def low_cosine(cosines: Vector, kept: Tensor | None) -> Tensor:
    """What annealing goes by: the mean of the kept rows' cosines less one standard deviation, which
    about a sixth of them are below. A 0-dim float32 tensor; inf, which it can't be, of no rows.
    """
    xp: Any = np if isinstance(cosines, np.ndarray) else torch
    mask = xp.ones_like(cosines, dtype=bool) if kept is None else _mask(kept, cosines)
    rows, count = xp.where(mask, cosines, 0.0), mask.sum()
    mean = rows.sum() / count
    low = mean - xp.sqrt(abs(rows.dot(rows) / count - mean * mean))  # rounding may be below 0
    return torch.as_tensor(xp.where(count > 0, low, math.inf)).float()


def _mask(kept: Tensor, numbers: Vector) -> Any:
    """The kept rows, for the library that the numbers are of."""
    return kept.numpy() if isinstance(numbers, np.ndarray) else kept


def divisor_of(
    index: Tensor, kept: Tensor | None, weight: Tensor | None, reduction: int, dtype: torch.dtype
) -> Tensor:
    """The sum of the kept targets' weights for a mean, else 1; a 0-dim tensor."""
    if reduction != MEAN:
        return torch.ones((), dtype=dtype, device=index.device)
    if weight is None:
        if kept is None:
            return torch.full((), index.shape[0], dtype=dtype, device=index.device)
        return kept.sum().to(dtype)
    w_y = weight.index_select(0, index).double()
    return (w_y if kept is None else torch.where(kept, w_y, 0.0)).sum().to(dtype)
