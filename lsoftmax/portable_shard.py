"""The fused loss of a shard of the classes in plain torch: what ``class_parallel`` adds up.

A shard has some rows of W and all rows of the batch. Forward leaves of each row the sums over the
shard's classes, against a reference of the shard's own; from the sums of all shards come the loss
and backward's numbers a row. A row's target is in one shard only: column y of E is 0 there, and the
target's part of the gradients is added apart, for a shard's share of a row's exponentials may
vanish where the target's part does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .margin import margin_terms, namespace, stacked
from .panels import exponentials
from .portable import make_e
from .products import Backward, products, recomputed


def shard_fwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int,
    lam: Tensor,
    smoothing: Tensor | None,
    save: bool,
    class_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """E, where ``save`` and no ``class_chunk``, the shard's sums, and its rows' cosines.

    Args:
        input: (N, D).
        linear_weight: (C_s, D), C_s >= 1.
        target: (N,), a row of ``linear_weight``, or -1 where the target is not in this shard.
        margin, lam: as everywhere.
        smoothing: (C_s,) class weights in the type of the logits with label smoothing, else None.
        save, class_chunk: as for ``loss_fwd``.

    Returns:
        E (N, >= C_s) = exp(z - r), 0 in the target's column; with label smoothing one more row,
        ``smoothing``, as of ``loss_fwd``; or an empty tensor. And (7, N) float64: r, about the
        largest z_j (minus the largest number of the logits' type where there is none), sum of
        exp(z_j - r), sum of smoothing_j z_j, all over j != y; and f, alpha, beta, gamma where the
        target is here, else 0. And (N,) float32, the cosine between x_i and w_y, 0 likewise.
    """
    num_classes = linear_weight.shape[0]
    smooth = smoothing is not None
    e, columns = make_e(input, num_classes, smoothing, save and class_chunk == 0)
    sums = exponentials(
        input, linear_weight, target, columns, smoothing, smooth, class_chunk, elsewhere=True
    )
    xp = namespace(input)
    here = xp.asarray(target) >= 0
    *margins, cosines = margin_terms(
        input, linear_weight, target.clamp(min=0), margin, lam, sums.plain
    )
    own = (xp.where(here, value, 0.0) for value in margins)
    weighted = 0.0 * sums.others if sums.weighted is None else sums.weighted
    row_sums = stacked((sums.reference, sums.others, weighted, *own), torch.float64)
    return e, row_sums, torch.as_tensor(xp.where(here, cosines, 0.0)).float()


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
    scale, input_share, weight_share, target_share, constant = rows
    back = Backward(
        input.to(rows.dtype),
        target,
        scale.unsqueeze(1),
        input_share,
        weight_share,
        target_share,
        None if smoothing is None else (constant, smoothing),
    )
    needed = need_input, need_weight
    if class_chunk:
        dx, dw = recomputed(back, linear_weight, reference, class_chunk, *needed)
    else:
        columns = e[: input.shape[0], : linear_weight.shape[0]]
        dx, dw = products(back, linear_weight, columns, True, *needed)
    return (
        rows.new_empty(0) if dx is None else dx,
        input.new_empty(0) if dw is None else dw.to(linear_weight.dtype),
    )
