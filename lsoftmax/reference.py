"""L-Softmax in plain autograd torch: the specification that every faster path is tested against.

It says what is computed, in the order of the paper (Liu, Wen, Yu, Yang: Large-Margin Softmax Loss
for Convolutional Neural Networks, ICML 2016), and leaves the gradient to autograd, so it can be
differentiated twice. It spends no thought on speed or memory; ``lsoftmax.functional`` has the same
signatures and does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["lsoftmax_linear", "lsoftmax_loss", "psi"]


def psi(cos_theta: Tensor, margin: int) -> Tensor:
    r"""The monotone extension of :math:`\cos(m\theta)` that replaces the target's cosine.

    .. math:: \psi(\theta) = (-1)^k \cos(m\theta) - 2k,\quad \theta \in [k\pi/m, (k+1)\pi/m]
        \qquad\text{(paper, equation 6)}

    written as a function of :math:`c = \cos\theta`: :math:`\cos(m\theta) = T_m(c)`, the Chebyshev
    polynomial of the first kind (three-term recurrence: the expanded monomials cancel, and powers
    divided by c are NaN at c = 0), and k is the number of bucket edges :math:`\cos(j\pi/m)`,
    j = 1..m-1, above c. No arccos, so the derivative is bounded by :math:`m^2` everywhere, and c
    may leave [-1, 1] by rounding. Computed in float64, and rounded once.

    Args:
        cos_theta: any shape, floating point.
        margin: m >= 1.

    Returns:
        A tensor of the shape and type of ``cos_theta``, in [1 - 2m, 1].
    """
    c = cos_theta.double()  # in 16 bits k would end at 256, and the edges near -1 be -1
    t_prev, t = torch.ones_like(c), c
    for _ in range(margin - 1):
        t_prev, t = t, 2 * c * t - t_prev
    k = torch.zeros_like(c)
    for j in range(1, margin):
        k = k + (c < math.cos(j * math.pi / margin)).to(c.dtype)
    return ((1 - 2 * (k % 2)) * t - 2 * k).to(cos_theta.dtype)


def lsoftmax_linear(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int = 4, lam: float | Tensor = 0.0
) -> Tensor:
    r"""Logits ``input @ linear_weight.T`` whose target column is the margin logit.

    .. math:: f_i = \frac{\lambda\, x_i \cdot w_{y_i} + |x_i||w_{y_i}|\,\psi(\theta_i)}{1 + \lambda}
        \qquad\text{(paper, section 5.1)}

    Where :math:`x_i` or :math:`w_{y_i}` is zero the angle is undefined; the plain logit (0, with
    its plain gradient) stands in, so that the row can leave zero.

    Args:
        input: (N, D) or (D,).
        linear_weight: (C, D), one row per class.
        target: (N,) or (), int64, in [0, C).
        margin: m >= 1.
        lam: annealing weight of the plain logit, >= 0; a number or a 0-dim tensor, rounded to
            float32.

    Returns:
        (N, C) or (C,) logits in the type of ``input``.
    """
    y = target.unsqueeze(-1)
    logits = F.linear(input, linear_weight)
    f = _target_logit(input, linear_weight, target, margin, lam)
    return logits.scatter(-1, y, f.to(logits.dtype).unsqueeze(-1))


def lsoftmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int = 4,
    lam: float | Tensor = 0.0,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of the margin logits of :func:`lsoftmax_linear` (paper, equation 4).

    Args:
        input: (N, D) or (D,).
        linear_weight: (C, D), one row per class.
        target: (N,) or (), int64, in [0, C) or equal to ``ignore_index``.
        margin: m >= 1.
        lam: annealing weight, >= 0; a 0-dim tensor or a number, rounded to float32.
        weight, reduction, ignore_index, label_smoothing: as
            :func:`torch.nn.functional.cross_entropy`.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or the shape of ``target`` for
        ``reduction="none"``.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    kept = torch.where(target == ignore_index, 0, target)
    if input.dtype in (torch.float16, torch.bfloat16):
        input, linear_weight = input.float(), linear_weight.float()
    logits = lsoftmax_linear(input, linear_weight, kept, margin, lam)
    return F.cross_entropy(
        logits,
        target,
        weight=None if weight is None else weight.to(logits.dtype),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def _target_logit(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: float | Tensor
) -> Tensor:
    """f, the shape of ``target``, in float64: psi magnifies an error of the cosine by up to m^2."""
    if not isinstance(lam, Tensor):  # filled in, not copied: a copy would wait for the device
        lam = torch.full((), float(lam), dtype=torch.float32, device=input.device)
    lam = lam.to(input.device, torch.float32).double()
    x, w = input.double(), F.embedding(target, linear_weight).double()  # [] does not vmap
    a, a_is_zero = _norm(x)
    b, b_is_zero = _norm(w)
    plain = (x * w).sum(-1)
    s = a * b
    margin_logit = (lam * plain + s * psi(plain / s, margin)) / (1 + lam)
    return torch.where(a_is_zero | b_is_zero, plain, margin_logit)


def _norm(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the last dimension, 1 for zero rows (sqrt has no slope at 0), and which are zero."""
    squared = (rows * rows).sum(-1)
    is_zero = squared == 0
    return torch.where(is_zero, 1.0, squared).sqrt(), is_zero
