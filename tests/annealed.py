"""Layers in the middle of their annealing, by each kind of schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsoftmax import LambdaSchedule, LSoftmaxLinear, LSoftmaxLoss

LAYERS = (LSoftmaxLoss, LSoftmaxLinear)


def curve() -> LambdaSchedule:
    return LambdaSchedule(base=10.0, gamma=0.5, power=2.0, minimum=0.3)


def held() -> LambdaSchedule:
    return LambdaSchedule(base=10.0, gamma=0.5, power=2.0, minimum=0.3, keep=0.6)


def counted() -> LambdaSchedule:
    return LambdaSchedule(base=10.0, gamma=0.5, power=2.0, minimum=0.3, keep=0.6, num_classes=5)


def constant() -> LambdaSchedule:
    return LambdaSchedule.constant(0.5)


def batch(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Features about their class vectors: of so few classes the nearest may be 90 degrees away, and
    then there is no angle to anneal by.
    """
    y = torch.randint(5, (8,))
    weight = getattr(head, "linear", head).weight.detach().float()
    return F.normalize(weight[y], dim=1) + 0.2 * torch.randn(8, 6), y


def trained(layer: type, lam: LambdaSchedule, steps: int = 3) -> nn.Module:
    head = layer(6, 5, margin=3, lam=lam)
    for _ in range(steps):
        head(*batch(head))
    assert lam.keep is None or lam.share > 0
    return head
