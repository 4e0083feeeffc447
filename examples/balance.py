"""Classes of unequal size: the usual remedies, weights of the loss and balanced batches.

Weights may be deferred, as Cao et al. (NeurIPS 2019) do it: features are learned without them, and
the last fifth of the epochs moves the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS, DEFERRED, BATCHES = WAYS = "weights", "deferred", "batches"  # what --balance names


def has_begun(balance: str | None, epoch: int, epochs: int) -> bool:
    """Whether the loss has class weights in this epoch, counted from 0."""
    return balance == WEIGHTS or (balance == DEFERRED and epoch >= 4 * epochs // 5)


def inverse_counts(labels: Tensor, classes: int) -> Tensor:
    """Weights (C,) of classes that make up for their sizes: of all images their mean is 1."""
    return len(labels) / (classes * torch.bincount(labels, minlength=classes))


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many images (N,) as there are, each class as likely as any other: they are put back, as
    torch.utils.data.WeightedRandomSampler does.
    """
    weights = inverse_counts(labels, int(labels.max()) + 1)[labels].double()
    return torch.multinomial(weights, len(labels), True, generator=generator)
