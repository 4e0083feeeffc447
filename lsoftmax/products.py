"""Backward of the fused loss in plain torch: the matrix products, with E kept or made again.

What is added to them is O(N D). The loss of all classes and that of a shard of them differ only in
what is in the rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .panels import TargetColumn, exponentiate, panels
from .shares import add_class_shares, add_shares


class Backward(NamedTuple):
    """What every way of backward starts from: rows times the upstream gradient, ignored ones 0."""

    x: Tensor  # (N, D), in the type of the rows, like all that follows
    targets: Tensor  # (N,), int64; -1: in another shard, and the shares are 0
    scale: Tensor  # (N, 1)
    input_share: Tensor  # (N,), like the next two
    weight_share: Tensor
    target_share: Tensor
    smoothing: tuple[Tensor, Tensor] | None  # constant_i (N,), w_j (C,): dz_ij = constant_i w_j


def products(
    back: Backward,
    linear_weight: Tensor,
    e: Tensor,
    apart: bool,
    need_input: bool,
    need_weight: bool,
    dw: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients from E (N, C), in the type of the rows; that of the weight added to ``dw``.

    ``apart``: E is 0 in the target's column, and the target's part is added to the products.
    """
    x, w = back.x, linear_weight.to(back.x.dtype)
    others = back.target_share if apart else None
    targets = back.targets.clamp(min=0)  # those of other shards have no shares here
    e = e.to(x.dtype)
    scale_e = e.shape[1] < x.shape[1]  # the smaller factor: E, or X
    if scale_e:
        e = e * back.scale
    dx = None
    if need_weight:  # first: its temporaries take the room that dX will
        dw = _plus_product(dw, e.t(), x if scale_e else x * back.scale)
        if back.smoothing is not None:
            constant, weight = back.smoothing
            dw.addr_(weight, torch.mv(x.t(), constant))
        add_class_shares(dw, x, w, targets, back.weight_share, others)
    if need_input:
        dx = torch.mm(e, w)
        if not scale_e:
            dx.mul_(back.scale)
        if back.smoothing is not None:
            constant, weight = back.smoothing
            dx.addr_(constant, torch.mv(w.t(), weight))
        add_shares(dx, x, w, targets, back.input_share, others)
    return dx, dw


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


def recomputed(
    back: Backward,
    linear_weight: Tensor,
    reference: Tensor,
    class_chunk: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The same with the gradient of a panel of logits at a time, its exponentials made again.

    Each slice of dW is written once, in the type of ``linear_weight``.
    """
    x, num_classes = back.x, linear_weight.shape[0]
    # Rows in memory one after the other, however the matrices lie: as the ops' fakes say.
    dx = x.new_zeros(x.shape) if need_input else None
    dw = linear_weight.new_empty(linear_weight.shape) if need_weight else None
    class_share = x.new_zeros(num_classes)
    class_share.index_add_(0, back.targets.clamp(min=0), back.weight_share)
    for classes, panel, z in panels(x, linear_weight, class_chunk):
        target = TargetColumn(z, classes, back.targets, None)
        target.fill(-math.inf)  # its exponential may be out of range
        exponentiate(z, reference, again=True)
        z.mul_(back.scale)
        if back.smoothing is not None:
            constant, weight = back.smoothing
            z.addr_(constant, weight[classes])
        if dx is not None:
            dx.addmm_(z, panel)
        if dw is not None:
            part = torch.mm(z.t(), x).addcmul_(panel, class_share[classes].unsqueeze(1))
            target.add_rows(part, x, back.target_share)
            dw[classes] = part
    if dx is not None:
        targets = back.targets.clamp(min=0)
        add_shares(dx, x, linear_weight, targets, back.input_share, back.target_share)
    return dx, dw
