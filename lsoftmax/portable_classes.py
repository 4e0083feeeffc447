"""What annealing that counts every class alike goes by, in plain torch: the ops' portable side.

In a long tail most classes are few of the rows: what a sixth of the rows exceed says nothing of
them. Here each class has a running mean of its cosines and of their squares, and the mean and the
deviation are those of the classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, linalg

# A cosine of 1 as an integer: sums of integers have one result in any order, these of up to 2^31
# rows, and float32 has no more digits.
_ONE = 2.0**32


def own_cosines(input: Tensor, linear_weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """(N,) float32: the cosine of each row and its class vector, 0 of a zero row, inf in the
    ignored ones.

    Args:
        input: (N, D).
        linear_weight: (C, D), of the same type.
        target: (N,), int64.
        ignore_index: of rows that do not count.
    """
    kept = target != ignore_index
    x = input.double()  # in which |x|^2 of a tiny or huge row stays in range
    own = linear_weight.index_select(0, torch.where(kept, target, 0)).double()
    norms = linalg.vector_norm(x, dim=1) * linalg.vector_norm(own, dim=1)
    cosines = torch.where(norms > 0, linalg.vecdot(x, own) / norms, 0.0)
    return torch.where(kept, cosines, math.inf).float()


def count_classes_(classes: Tensor, cosines: Tensor, target: Tensor, memory: float) -> Tensor:
    """Take a batch into the running means of its classes, in place; what they say then.

    Args:
        classes: (2, C) float32: of each class the mean cosine and the mean square, -1 before a
            first row.
        cosines: (N,) float32, see :func:`own_cosines`; NaN counts as 0.
        target: (N,), int64; it may be anything where the cosine is inf.
        memory: of a class's running means, over the batches that it is in.

    Returns:
        The mean over classes less one standard deviation, as ``rows.low_cosine`` is of rows: a
        0-dim float32 tensor, inf where the batch has no row.
    """
    kept = cosines != math.inf
    label = torch.where(kept, target, 0)
    cosines = torch.where(kept, cosines, 0.0).nan_to_num(0.0)
    moments = torch.stack([cosines, cosines * cosines])
    exact = (moments.double() * _ONE).round().long()
    sums = label.new_zeros(3, classes.shape[1])
    sums.index_add_(1, label, torch.cat([kept.long().unsqueeze(0), exact]))

    # Of each row's class, so that no more is as long as there are classes.
    count, *totals = sums[:, label].double()
    means = (torch.stack(totals) / (_ONE * count)).float()
    old = classes[:, label]
    begun = (old[1] >= 0).float()  # else the batch is all there is
    rate = 1 - memory * begun
    new = torch.where(count > 0, old + rate * (means - old), old)
    classes.index_copy_(1, label, new)  # the same number from every row of a class

    known = (classes[1] >= 0).sum()
    mean, square = classes[0].sum() / known, classes[1].clamp(min=0).sum() / known
    low = mean - (square - mean * mean).abs().sqrt()
    return torch.where(kept.any(), low, math.inf)
