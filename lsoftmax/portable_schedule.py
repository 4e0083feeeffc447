"""A training step's annealing in plain torch, for every machine: see ``schedule``.

Two ops rather than their formulas where they are used: on a GPU each is one launch, where 0-dim
tensors would take some twenty a step. On a CPU the numbers are numpy's, as in ``margin``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .margin import namespace, vector


def upcoming_lam(
    steps: Tensor,
    share: Tensor,
    base: float,
    gamma: float,
    power: float,
    minimum: float,
    least_share: float,
) -> Tensor:
    """lam of the next step, 0-dim float32: the curve, or what ``share`` holds it up to.

    Args:
        steps: 0-dim int64, taken so far.
        share: 0-dim float32, the largest 1 / (1 + lam) that the angles allow.
        base, gamma, power, minimum: of the curve.
        least_share: that ``share`` counts for; 0: it counts for nothing.
    """
    # float64: (1 + 1e-5 t)^-45 would lose the annealing's last digits in float32
    lam = _at_least(base * (1.0 + gamma * vector(steps + 1)) ** -power, minimum)
    if least_share > 0:
        held = 1.0 / _at_least(vector(share), least_share) - 1.0
        lam = namespace(share).maximum(lam, held)
    return torch.as_tensor(lam).float()


def anneal_(
    steps: Tensor,
    lam: Tensor,
    share: Tensor,
    next_lam: Tensor | None,
    cosine: Tensor | None,
    margin: int,
    keep: float,
    memory: float,
) -> None:
    """A training step's change of a schedule, in place.

    Args:
        steps, lam, share: 0-dim int64, float32, float32.
        next_lam: of the step that is taken, 0-dim float32; None: none is.
        cosine: of a batch, ``rows.low_cosine``, 0-dim float32, NaN and what is below 0 counting as
            0; None, or inf, as of no rows: nothing was measured.
        margin: of the layer.
        keep: the share of softmax's logit that the target's is to keep at that angle. Below 0: none
            is, and ``share`` is that of each lam, for whoever goes on with a keep.
        memory: of the running mean over batches.
    """
    if next_lam is not None:
        steps.add_(1)
        lam.copy_(next_lam)
        if keep < 0:
            share.copy_(torch.as_tensor(1.0 / (1.0 + vector(lam))))
    if cosine is None:
        return
    xp = namespace(share)
    c, old = vector(cosine.detach()), vector(share)  # in an exported program it has a gradient
    none = xp.isinf(c)
    c = _at_most(_at_least(xp.where(xp.isnan(c), 0.0, c), 0.0), 1.0)
    taken = c - 1.0 + 2 * margin / math.pi * xp.arccos(c)  # cos - psi
    allowed = _at_most((1 - keep) * c / _at_least(taken, 1e-6), 1.0)
    share.copy_(torch.as_tensor(old + xp.where(none, 0.0, (1 - memory) * (allowed - old))))


def _at_least(number: Any, bound: float) -> Any:
    return number.clip(bound, None)


def _at_most(number: Any, bound: float) -> Any:
    return number.clip(None, bound)
