"""The margin's share of the gradients, added to the matrix products of both ops: O(N D)."""

from __future__ import annotations

from torch import Tensor

from .margin import row_parts


def add_shares(
    dx: Tensor, x: Tensor, w: Tensor, target: Tensor, own: Tensor, others: Tensor | None
) -> Tensor:
    """dx_i += own_i x_i + others_i w_y."""
    dx.addcmul_(x, own.unsqueeze(1))
    if others is not None:
        for part in row_parts(x):
            dx[part].addcmul_(
                w.index_select(0, target[part]).to(dx.dtype), others[part].unsqueeze(1)
            )
    return dx


def add_class_shares(
    dw: Tensor, x: Tensor, w: Tensor, target: Tensor, own: Tensor, others: Tensor | None
) -> Tensor:
    """dw_c += sum over {i: y_i = c} of own_i w_c + others_i x_i; touches the targets' rows only."""
    if others is not None:
        for part in row_parts(x):
            dw.index_add_(0, target[part], x[part] * others[part].unsqueeze(1))
    if w.shape[0] <= target.shape[0]:
        h = own.new_zeros(w.shape[0]).index_add_(0, target, own)
        return dw.addcmul_(w, h.unsqueeze(1))
    return dw.index_add_(0, target, w.index_select(0, target).mul_(own.unsqueeze(1)))
