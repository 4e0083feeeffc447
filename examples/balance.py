"""Classes of unequal size: the two usual remedies, weights of the loss and balanced batches."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS, BATCHES = "weights", "batches"  # what --balance names


def inverse_counts(labels: Tensor, classes: int) -> Tensor:
    """Weights (C,) of classes that make up for their sizes: of all images their mean is 1."""
    return len(labels) / (classes * torch.bincount(labels, minlength=classes))


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many images (N,) as there are, each class as likely as any other: they are put back, as
    torch.utils.data.WeightedRandomSampler does.
    """
    weights = inverse_counts(labels, int(labels.max()) + 1)[labels].double()
    return torch.multinomial(weights, len(labels), True, generator=generator)
