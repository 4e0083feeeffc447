"""The fused loss in plain torch, for every machine: the E form.

The forward pass turns the logits in place into E_j = exp(z_j - r), j != y, which is what backward
needs, so that backward is two matrix products. Column y of E, in units of the row's scale, holds
the target's part too, and the norms' share of the margin (beta, gamma of ``margin_terms``) is one
multiple of x_i and one of w_y a row. Near the class vector alpha w_y and beta x nearly cancel
(alpha is up to m^2): where E is narrower than its row's numbers, its target column is 0 and the
target's part is added apart. So it is among many classes, where it may be as large as all others
together, and a sum that has it loses their digits.

Where the N x C array E does not fit there are two ways round it: in chunks of classes E is made
again in backward (any reduction); in chunks of rows the gradients are formed in forward, while a
chunk's E is at hand (a loss that is one number).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .margin import Vector, accumulate_type, column_of, margin_terms, namespace
from .panels import exponentials
from .products import Backward, products, recomputed
from .rows import divisor_of, low_cosine, reduce, row_terms, saved_rows, valid_targets

# From here on the target's part is kept out of E; the kernels do so too, see csrc/loss.h.
_MANY_CLASSES = 1024


def e_storage(input: Tensor, num_classes: int, smooth: bool) -> tuple[list[int], torch.dtype]:
    """Shape and type of E, the one N x C array that is kept for backward.

    bfloat16 input keeps E in bfloat16 (relative precision is all E needs), its rows padded to 16
    bytes, as matrix units want them. float16 has not the range of an exponential: E is float32.
    With label smoothing one more row holds the class weights: the constant part of the smoothed
    gradient has rank one, and as a row of E it costs no pass of its own.
    """
    rows = input.shape[0] + (1 if smooth else 0)
    if input.dtype == torch.bfloat16:
        return [rows, (num_classes + 7) // 8 * 8], torch.bfloat16
    return [rows, num_classes], accumulate_type(input.dtype)


def make_e(
    input: Tensor, num_classes: int, smoothing: Tensor | float | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """E but for what forward fills, and that part of it (N, C); where not to ``keep`` an empty one.

    ``smoothing``: the class weights of label smoothing's row, None without it.
    """
    shape, dtype = e_storage(input, num_classes, smoothing is not None)
    e = input.new_empty(shape if keep else [0], dtype=dtype)
    if not keep:
        return e, None
    e[:, num_classes:] = 0.0  # the padding
    if smoothing is not None:
        e[-1, :num_classes] = smoothing
    return e, e[: input.shape[0], :num_classes]


def target_apart(e_dtype: torch.dtype, num_classes: int) -> bool:
    """Whether the target's part of the gradients is added to the products, not in E."""
    return e_dtype == torch.bfloat16 or num_classes > _MANY_CLASSES


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
    class_chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss; for backward (where ``save``) E and five numbers a row; the mean's divisor; the
    low cosine between the kept rows and their class vectors.

    With a ``class_chunk`` other than 0 there is no E.
    """
    num_classes = linear_weight.shape[0]
    dtype = accumulate_type(input.dtype)
    index, kept = valid_targets(target, num_classes, ignore_index)
    smoothing = None if label_smoothing == 0 else 1.0 if weight is None else weight
    e, filled = make_e(input, num_classes, smoothing, save and class_chunk == 0)
    row_loss, rows, cosines = _rows_of(
        input,
        linear_weight,
        index,
        kept,
        margin,
        lam,
        weight,
        label_smoothing,
        filled,
        save,
        class_chunk,
    )
    loss, divisor = reduce(row_loss, index, kept, weight, reduction, dtype)
    return loss, e, rows, divisor, low_cosine(cosines, kept)


def _rows_of(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    kept: Tensor | None,
    margin: int,
    lam: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    e: Tensor | None,
    save: bool,
    class_chunk: int = 0,
) -> tuple[Vector, Tensor, Vector]:
    """Each row's loss, what is saved of it, and its cosine; fills E (N, C) where given."""
    smooth = label_smoothing > 0
    sums = exponentials(input, linear_weight, index, e, weight, smooth, class_chunk)
    *margins, cosines = margin_terms(input, linear_weight, index, margin, lam, sums.plain)
    sums.raise_reference(margins[0], e)
    terms = row_terms(margins, sums, index, linear_weight.shape[0], weight, label_smoothing)
    dtype = sums.plain.dtype
    if not save:
        return terms.loss, input.new_empty(0, dtype=dtype), cosines
    if e is not None and not target_apart(e.dtype, linear_weight.shape[0]):  # in units of the scale
        xp = namespace(input)
        e_y = terms.target_share / xp.where(terms.scale == 0, 1.0, terms.scale)
        e.scatter_(1, index.unsqueeze(1), column_of(e_y, dtype))
    if e is not None and kept is not None:
        e.masked_fill_(~kept.unsqueeze(1), 0.0)  # may be NaN, and 0 * NaN is not 0
    return terms.loss, saved_rows(terms, sums.reference, kept, dtype), cosines


def _backward_of(
    g: Tensor,
    rows: Tensor,
    input: Tensor,
    index: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    num_classes: int,
) -> Backward:
    """``g``: the gradient of each row's loss, () or (N,)."""
    x = input.to(rows.dtype)
    if kept is not None:
        x = torch.where(kept.unsqueeze(1), x, 0.0)
        g = torch.where(kept, g, 0.0)  # the mean of no kept rows has an infinite one
    scale, input_share, weight_share, target_share = (g * rows[:4]).unbind()
    smoothing = None
    if label_smoothing > 0:
        constant = (g * (-label_smoothing / num_classes)).expand(rows.shape[1])
        smoothing = constant, rows.new_ones(num_classes) if weight is None else weight
    scale = scale.unsqueeze(1)
    return Backward(x, index, scale, input_share, weight_share, target_share, smoothing)


def loss_bwd(
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
    """Gradients of ``input`` and ``linear_weight``; an empty tensor for one that is not needed."""
    n, num_classes = input.shape[0], linear_weight.shape[0]
    index, kept = valid_targets(target, num_classes, ignore_index)
    back = _backward_of(
        grad / divisor, rows, input, index, kept, weight, label_smoothing, num_classes
    )
    needed = need_input, need_weight
    if class_chunk:
        dx, dw = recomputed(back, linear_weight, rows[4], class_chunk, *needed)
    else:
        apart = target_apart(e.dtype, num_classes)
        dx, dw = products(back, linear_weight, e[:n, :num_classes], apart, *needed)
    none = input.new_empty(0)
    return (
        none if dx is None else dx.to(input.dtype),
        none if dw is None else dw.to(linear_weight.dtype),
    )


def loss_and_gradients(
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
    """The loss, a sum or a mean; its gradients in the type of the logits; the low cosine."""
    n, num_classes = input.shape[0], linear_weight.shape[0]
    dtype = accumulate_type(input.dtype)
    index, kept = valid_targets(target, num_classes, ignore_index)
    divisor = divisor_of(index, kept, weight, reduction, dtype)
    buffer = input.new_empty(min(row_chunk, n), num_classes, dtype=dtype)
    apart = target_apart(dtype, num_classes)
    losses, cosines, parts = [], [], []
    dw: Tensor | None = None
    for start in range(0, max(1, n), row_chunk):
        part = slice(start, start + row_chunk)
        x, y = input[part], index[part]
        kept_part = None if kept is None else kept[part]
        e = buffer[: x.shape[0]]
        row_loss, rows, cosine = _rows_of(
            x, linear_weight, y, kept_part, margin, lam, weight, label_smoothing, e, True
        )
        back = _backward_of(
            1.0 / divisor, rows, x, y, kept_part, weight, label_smoothing, num_classes
        )
        dx, dw = products(back, linear_weight, e, apart, need_input, need_weight, dw)
        losses.append(row_loss)
        cosines.append(cosine)
        if dx is not None:
            parts.append(dx)
    xp = namespace(input)
    loss, _ = reduce(xp.concatenate(losses), index, kept, weight, reduction, dtype)
    none = input.new_empty(0, dtype=dtype)
    return (
        loss,
        torch.cat(parts) if parts else none,
        none if dw is None else dw,
        low_cosine(xp.concatenate(cosines), kept),
    )
