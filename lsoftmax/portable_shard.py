"""The fused loss of a shard of the classes in plain torch: what ``class_parallel`` adds up.

A shard has some rows of W and all rows of the batch. Forward leaves of each row the sums over the
shard's classes, against a reference of the shard's own; from the sums of all shards come the loss
and backward's numbers a row. A row's target is in one shard only: column y of E is 0 there, and the
target's part of the gradients is added apart, for a shard's share of a row's exponentials may
vanish where the target's part does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .margin import margin_terms, namespace, stacked
from .panels import TargetColumn, exponentials, exponentiate, panels
from .portable import e_storage
from .shares import add_class_shares, add_shares


def shard_fwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int,
    lam: Tensor,
    smoothing: Tensor | None,
    save: bool,
    class_chunk: int,
) -> tuple[Tensor, Tensor]:
    """E, where ``save`` and no ``class_chunk``, and the shard's sums.

    Args:
        input: (N, D).
        linear_weight: (C_s, D), C_s >= 1.
        target: (N,), a row of ``linear_weight``, or -1 where the target is not in this shard.
        margin, lam: as everywhere.
        smoothing: (C_s,) class weights in the type of the logits with label smoothing, else None.
        save, class_chunk: as for ``loss_fwd``.

    Returns:
        E (N, >= C_s) = exp(z - r), 0 in the target's column, or an empty tensor; and (7, N)
        float64: r, about the largest z_j (minus the largest number of the logits' type where there
        is none), sum of exp(z_j - r), sum of smoothing_j z_j, all over j != y; and f, alpha, beta,
        gamma where the target is here, else 0.
    """
    num_classes = linear_weight.shape[0]
    shape, dtype = e_storage(input, num_classes, 0.0)
    keep_e = save and class_chunk == 0
    e = input.new_empty(shape if keep_e else [0], dtype=dtype)
    if keep_e:
        e[:, num_classes:] = 0.0  # the padding
    columns = e[:, :num_classes] if keep_e else None
    smooth = smoothing is not None
    sums = exponentials(
        input, linear_weight, target, columns, smoothing, smooth, class_chunk, elsewhere=True
    )
    xp = namespace(input)
    here = xp.asarray(target) >= 0
    margins = margin_terms(input, linear_weight, target.clamp(min=0), margin, lam, sums.plain)
    own = (xp.where(here, value, 0.0) for value in margins)
    weighted = 0.0 * sums.others if sums.weighted is None else sums.weighted
    return e, stacked((sums.reference, sums.others, weighted, *own), torch.float64)


def shard_bwd(
    rows: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    smoothing: Tensor | None,
    e: Tensor,
    reference: Tensor,
    class_chunk: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The shard's part of dX and its own dW; an empty tensor for one that is not needed.

    Args:
        rows: (5, N), times the upstream gradient, in the type of the logits: the scale of the
            row's exponentials; then, 0 where the target is not here, the shares of x_i in dx_i, of
            w_y in dw_y and of each other in both; and with label smoothing the constant_i of
            dz_ij = constant_i smoothing_j.
        reference: (N,), r of ``shard_fwd``; for chunks.
        input, linear_weight, target, smoothing, e, class_chunk: as of ``shard_fwd``.
        need_input, need_weight: which gradients are wanted.

    Returns:
        (N, D) in the type of the logits, for parts in 16 bits must not be added up; and (C_s, D) in
        the type of ``linear_weight``.
    """
    x = input.to(rows.dtype)
    product = _recomputed if class_chunk else _stored
    dx, dw = product(
        *(rows, x, linear_weight, target, smoothing),
        reference if class_chunk else e[:, : linear_weight.shape[0]],
        *(class_chunk, need_input, need_weight),
    )
    none = x.new_empty(0)
    return none if dx is None else dx, none.to(input.dtype) if dw is None else dw


def _stored(
    rows: Tensor,
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    smoothing: Tensor | None,
    e: Tensor,
    class_chunk: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Two products with E."""
    scale, input_share, weight_share, others, constant = rows
    w, e, index = linear_weight.to(x.dtype), e.to(x.dtype), target.clamp(min=0)
    dx = dw = None
    if need_weight:
        dw = torch.mm(e.t(), x * scale.unsqueeze(1))
        if smoothing is not None:
            dw.addr_(smoothing, torch.mv(x.t(), constant))
        add_class_shares(dw, x, w, index, weight_share, others)
        dw = dw.to(linear_weight.dtype)
    if need_input:
        dx = torch.mm(e, w).mul_(scale.unsqueeze(1))
        if smoothing is not None:
            dx.addr_(constant, torch.mv(w.t(), smoothing))
        add_shares(dx, x, w, index, input_share, others)
    return dx, dw


def _recomputed(
    rows: Tensor,
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    smoothing: Tensor | None,
    reference: Tensor,
    class_chunk: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The same with the gradient of a panel of logits at a time, its exponentials made again."""
    scale, input_share, weight_share, others, constant = rows
    dx = torch.zeros_like(x) if need_input else None
    dw = torch.empty_like(linear_weight) if need_weight else None
    index = target.clamp(min=0)
    class_share = x.new_zeros(linear_weight.shape[0]).index_add_(0, index, weight_share)
    for classes, panel, z in panels(x, linear_weight, class_chunk):
        column = TargetColumn(z, classes, target, None)
        column.fill(-math.inf)
        exponentiate(z, reference)
        z.mul_(scale.unsqueeze(1))
        column.add(others.unsqueeze(1))
        if smoothing is not None:
            z.addr_(constant, smoothing[classes])
        if dx is not None:
            dx.addmm_(z, panel)
        if dw is not None:
            dw[classes] = torch.mm(z.t(), x).addcmul_(panel, class_share[classes].unsqueeze(1))
    if dx is not None:
        dx.addcmul_(x, input_share.unsqueeze(1))
    return dx, dw
