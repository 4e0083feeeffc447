"""The margin in plain torch: psi, its derivative, the target's logit and its gradient.

Everything here is float64, whatever the inputs: psi magnifies an error of the cosine by up to m^2,
and it is O(N D) work beside the O(N C D) of the logits. csrc/margin.cuh is the same for kernels.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# Target rows are gathered and widened to float64 an eighth of the batch at a time: less than the
# gradient of the input takes later, so it never raises the peak memory of a training step.
_CHUNKS = 8


@functools.cache
def _buckets(margin: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Edges cos(j pi / m), ascending; and by the number of edges not above c: (-1)^k, 2k."""
    ks = range(margin - 1, -1, -1)
    columns = (
        [math.cos(k * math.pi / margin) for k in ks if k > 0],
        [(-1.0) ** k for k in ks],
        [2.0 * k for k in ks],
    )
    edges, sign, fall = (torch.tensor(c, dtype=torch.float64, device=device) for c in columns)
    return edges, sign, fall


def psi_and_derivative(c: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    """psi(c) = (-1)^k T_m(c) - 2k and psi'(c) = (-1)^k m U_{m-1}(c), by the recurrence of U."""
    u_prev, u = torch.zeros_like(c), torch.ones_like(c)
    for _ in range(margin - 1):
        u_prev, u = u, torch.addcmul(u_prev, c, u, value=-2).neg_()
    t = torch.addcmul(-u_prev, c, u)  # T_m = c U_{m-1} - U_{m-2}
    if margin == 1:
        return t, u
    edges, sign, fall = _buckets(margin, c.device)
    bucket = torch.bucketize(c, edges, right=True)
    sign = sign[bucket]
    return (sign * t).sub_(fall[bucket]), (sign * u).mul_(margin)


def _target_products(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_i . w_y, |x_i|, |w_y|: (N,) float64."""
    chunk = -(-x.shape[0] // _CHUNKS) or 1
    buffers = x.new_empty((2, chunk, x.shape[1]), dtype=torch.float64)
    parts = []
    for start in range(0, x.shape[0], chunk):
        rows = x[start : start + chunk]
        x64, w64 = buffers[:, : rows.shape[0]]
        x64.copy_(rows)
        w64.copy_(w.index_select(0, y[start : start + chunk]))
        norms = torch.linalg.vector_norm(x64, dim=1), torch.linalg.vector_norm(w64, dim=1)
        parts.append((x64.mul_(w64).sum(1), *norms))
    if not parts:
        return tuple(x.new_empty((3, 0), dtype=torch.float64))
    u, a, b = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return u, a, b


def margin_terms(
    input: Tensor, linear_weight: Tensor, target: Tensor, margin: int, lam: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f, alpha, beta, gamma: df/dx = alpha w_y + beta x, df/dw_y = alpha x + gamma w_y.

    A zero row has no angle: the plain logit, whose gradient lets it leave zero. All four (N,)
    float64.
    """
    u, a, b = _target_products(input, linear_weight, target)
    s = a * b
    undefined = s == 0
    # On a CPU, looking is cheaper than masking; on a GPU it would stop the device.
    masked = input.device.type != "cpu" or bool(undefined.any())
    if masked:
        s, a, b = (torch.where(undefined, 1.0, value) for value in (s, a, b))
    c = u / s
    p, dp = psi_and_derivative(c, margin)
    lam = lam.double()
    share = torch.reciprocal(1 + lam)
    f = (s * p).add_(u * lam).mul_(share)
    alpha = (dp + lam).mul_(share)
    q = torch.addcmul(p, c, dp, value=-1).mul_(share)
    ratio = b / a
    beta, gamma = q * ratio, q / ratio
    if masked:
        f, beta, gamma = (torch.where(undefined, 0.0, value) for value in (f, beta, gamma))
        alpha = torch.where(undefined, 1.0, alpha)
    return f, alpha, beta, gamma
