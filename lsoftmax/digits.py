"""Handwritten digits as points in the plane: the small training behind ``plot features``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from .modules import LSoftmaxLoss
from .plots import Features, name_of
from .schedule import LambdaSchedule

EPOCHS, BATCH = 25, 64


def annealing(steps: int) -> LambdaSchedule:
    """From lam = 1000, where every margin is plain softmax, to 0.3 after 70% of the steps.

    Ten classes in a plane are 36 degrees apart, where psi is negative: switched on early, the
    margin makes features and class vectors shrink, and a class is lost. So, later than by default.
    """
    base, power, minimum = 1000.0, 4.0, 0.3
    gamma = ((base / minimum) ** (1 / power) - 1) / (0.7 * steps)
    return LambdaSchedule(base, gamma, power, minimum)


def learn_all(margins: Sequence[int] = (1, 2, 3, 4)) -> tuple[list[Features], list[int]]:
    """scikit-learn's digits as seen by a network trained with each margin, and their labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.data).float() / 16
    labels = torch.from_numpy(digits.target).long()
    panels = []
    for margin in margins:
        print(f"training with {name_of(margin)}", file=sys.stderr)
        panels.append(learn(images, labels, margin))
    return panels, labels.tolist()


def learn(images: Tensor, labels: Tensor, margin: int, seed: int = 0) -> Features:
    """Features (N, 2) of images (N, 64) from a small network trained on them.

    Initial weights and the order of the data are the same for every margin.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.PReLU()),
            *(nn.Linear(128, 64, bias=False), nn.BatchNorm1d(64), nn.PReLU()),
            nn.Linear(64, 2),
        )
        steps = EPOCHS * (len(labels) // BATCH)
        criterion = LSoftmaxLoss(2, 10, margin, lam=annealing(steps))
        parameters = [*network.parameters(), *criterion.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=2e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, steps, pct_start=0.1)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
                optimizer.zero_grad()
                criterion(network(images[batch]), labels[batch]).backward()
                optimizer.step()
                scheduler.step()
    network.eval()
    with torch.no_grad():
        features, class_vectors = network(images), criterion.linear.weight.detach()
    cosines = F.cosine_similarity(features, class_vectors[labels])
    angle = torch.rad2deg(torch.acos(cosines.clamp(-1, 1))).mean().item()
    title = f"{name_of(margin)}\nmean angle {angle:.1f}°"
    return Features(features, class_vectors, title)
