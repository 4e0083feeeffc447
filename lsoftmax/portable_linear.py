"""The margin logits in plain torch, for every machine.

Backward's products hold the target's logit with a slope of 1; the rest is added: no copy of the
N x C gradient is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .margin import accumulate_type, column_of, margin_terms, stacked
from .rows import NO_INDEX, low_cosine, valid_targets
from .shares import add_class_shares, add_shares


def linear_fwd(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Margin logits (N, C); alpha, beta, gamma of each row for backward, (3, N); low cosine."""
    index, _ = valid_targets(target, linear_weight.shape[0], NO_INDEX)
    logits = torch.nn.functional.linear(input, linear_weight)
    plain = None
    if logits.dtype == accumulate_type(input.dtype):  # else rounded to 16 bits
        plain = logits.gather(1, index.unsqueeze(1)).squeeze(1)
    f, *coefficients, cosines = margin_terms(input, linear_weight, index, margin, lam, plain)
    logits.scatter_(1, index.unsqueeze(1), column_of(f, logits.dtype))
    saved = stacked(coefficients, accumulate_type(input.dtype))
    return logits, saved, low_cosine(cosines, None)


def linear_bwd(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    coefficients: Tensor,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``input`` and ``linear_weight``; an empty tensor for one that is not needed."""
    dtype = coefficients.dtype
    x, w = input.to(dtype), linear_weight.to(dtype)
    alpha, beta, gamma = coefficients
    g = grad.to(dtype)
    g_y = g.gather(1, target.unsqueeze(1)).squeeze(1)
    rest = g_y * (alpha - 1)

    grad_input = grad_weight = input.new_empty(0)
    if need_input:
        dx = add_shares(torch.mm(g, w), x, w, target, g_y * beta, rest)
        grad_input = dx.to(input.dtype)
    if need_weight:
        dw = add_class_shares(torch.mm(g.t(), x), x, w, target, g_y * gamma, rest)
        grad_weight = dw.to(linear_weight.dtype)
    return grad_input, grad_weight
