"""An angle that counts every class alike, however many of the rows are of it.

In a long tail most classes are few of the rows: what a sixth of the rows exceed says nothing of
them. Here each class has a running mean of its cosines and of their squares, and the mean and the
deviation are those of the classes. Plain torch on every device, for it is no pass over N x C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .rows import NO_INDEX

_MEMORY = 0.7  # of a class's running means, over the batches that it is in
_ONE = 2.0**40  # a cosine of 1 as an integer: sums of integers have one result in any order


def beginning(num_classes: int, device: torch.device | None) -> Tensor:
    """(2, C) float32: of each class the mean cosine and the mean square, -1 before a first row."""
    start = torch.tensor([[0.0], [-1.0]], dtype=torch.float32, device=device)
    return start.repeat(1, num_classes)


@torch.no_grad()
def take_in(
    classes: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ignore_index: int = NO_INDEX,
) -> Tensor:
    """Take a batch into the running means of its classes, in place; what they say then.

    Args:
        classes: (2, C) float32, see :func:`beginning`.
        input: (N, D) or (D,).
        linear_weight: (C, D).
        target: (N,) or (), int64; rows of ``ignore_index`` do not count.

    Returns:
        The mean over classes less one standard deviation, as ``rows.low_cosine`` is of rows: a
        0-dim float32 tensor, inf where the batch has no row.
    """
    num_classes = classes.shape[1]
    label = target.reshape(-1)
    kept = label != ignore_index
    label = torch.where(kept, label, 0)
    x = input.reshape(-1, linear_weight.shape[1]).float()
    cosine = F.cosine_similarity(x, linear_weight[label].float(), dim=1)
    cosine = torch.where(kept, cosine, 0.0).nan_to_num(0.0)

    moments = (torch.stack([cosine, cosine * cosine]).double() * _ONE).round().long()
    counts = label.new_zeros(num_classes).index_add_(0, label, kept.long())
    sums = label.new_zeros(2, num_classes).index_add_(1, label, moments)
    means = (sums.double() / (_ONE * counts.clamp(min=1))).float()
    rate = torch.where(classes[1] < 0, 1.0, 1 - _MEMORY)  # the first batch is all there is
    classes.copy_(torch.where(counts > 0, classes + rate * (means - classes), classes))

    known = classes[1] >= 0
    mean, square = torch.where(known, classes, 0.0).sum(1) / known.sum()
    low = mean - (square - mean * mean).abs().sqrt()
    return torch.where(kept.any(), low, math.inf)
