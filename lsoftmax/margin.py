"""The margin in plain torch: psi, its derivative, the target's logit and its gradient.

O(N D) work beside the O(N C D) of the logits. What is per row is float64, whatever the inputs: psi
magnifies an error of the cosine by up to m^2. csrc/margin.cuh is the same for the kernels.

A vector, below, is a number per row: a float64 tensor, and for CPU tensors its numpy view, whose
operations cost a third of a tensor's. Functions of vectors are written so that both will do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Vector = Any

# Rows whose norms are inside this range have squares inside float32's.
_SAFE_NORMS = (1e-15, 1e15)

# Above this cosine a float32 dot product has lost digits that psi, steepest there, makes count.
_NEAR = 0.9

# Elements of features, and of class vectors beside them, worked on at a time.
_CHUNK = 1 << 13


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """The type of logits, row statistics and losses for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def vector(numbers: Tensor) -> Vector:
    """A tensor (N,) as a vector; memory is shared where the type allows."""
    wide = numbers.double()
    return wide.numpy() if wide.device.type == "cpu" else wide


def namespace(tensor: Tensor) -> Any:
    """The library whose functions take the vectors that belong to ``tensor``."""
    return np if tensor.device.type == "cpu" else torch


def stacked(vectors: Sequence[Vector], dtype: torch.dtype) -> Tensor:
    """Vectors as the rows of a tensor."""
    if isinstance(vectors[0], np.ndarray):
        return torch.from_numpy(np.array(vectors)).to(dtype)
    return torch.stack(tuple(vectors)).to(dtype)


def column_of(numbers: Vector, dtype: torch.dtype) -> Tensor:
    """A vector as a (N, 1) tensor, to be broadcast over rows."""
    return torch.as_tensor(numbers).to(dtype).unsqueeze(1)


def row_parts(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x (N, D), one at least, for what must not take as much room as x."""
    on_cpu = x.device.type == "cpu"  # elsewhere a part is launches, and saves nothing
    step = max(1, _CHUNK // max(1, x.shape[1]) if on_cpu else x.shape[0])
    for start in range(0, max(1, x.shape[0]), step):
        yield slice(start, start + step)


def psi_and_derivative(c: Vector, margin: int) -> tuple[Vector, Vector]:
    """psi(c) = (-1)^k T_m(c) - 2k and psi'(c) = (-1)^k m U_{m-1}(c), by the recurrence of U."""
    if margin == 1:
        return c, 0.0 * c + 1.0
    twice = c + c
    u_prev, u = 1.0, twice
    for _ in range(margin - 2):
        u_prev, u = u, twice * u - u_prev
    t = c * u - u_prev  # T_m = c U_{m-1} - U_{m-2}
    k = 0
    for edge in _bucket_edges(margin):
        k = k + (c < edge)
    parity = 1.0 - 2.0 * (k % 2)
    return parity * t - 2.0 * k, margin * parity * u


@functools.cache
def _bucket_edges(margin: int) -> tuple[float, ...]:
    return tuple(math.cos(j * math.pi / margin) for j in range(1, margin))


def _norms(x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """|x_i| and |w_y|, (2, N), computed in ``dtype``."""
    x_norms = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    if w.shape[0] <= y.shape[0]:
        w_norms = torch.linalg.vector_norm(w, dim=1, dtype=dtype).index_select(0, y)
    else:
        w_norms = torch.linalg.vector_norm(w.index_select(0, y), dim=1, dtype=dtype)
    return torch.stack((x_norms, w_norms))


def _near_cosines(
    x: Tensor, w: Tensor, y: Tensor, a: Vector, b: Vector, dtype: torch.dtype
) -> Vector:
    """cos = 1 - |w_y / b - x / a|^2 / 2: near 1 the chord keeps the digits of 1 - cos."""
    a, b = torch.as_tensor(a).to(dtype).unsqueeze(1), torch.as_tensor(b).to(dtype).unsqueeze(1)
    chords = []
    for part in row_parts(x):
        across = w.index_select(0, y[part]).to(dtype).div_(b[part])
        across.sub_(x[part].to(dtype) / a[part])
        chords.append(torch.linalg.vector_norm(across, dim=1))
    chord = vector(torch.cat(chords))
    return 1.0 - 0.5 * chord * chord


def margin_terms(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int,
    lam: Tensor,
    plain: Tensor | None = None,
) -> tuple[Vector, Vector, Vector, Vector, Vector]:
    """f, alpha, beta, gamma, cos: df/dx = alpha w_y + beta x, df/dw_y = alpha x + gamma w_y.

    ``plain`` (N,) is x_i . w_y where it is at hand in float32 or better. A zero row has no angle:
    the plain logit, whose gradient lets it leave zero, and a cosine of 0.
    """
    xp = namespace(input)
    # On a CPU, looking for rows that need care is cheaper than the care; on a GPU it would stop
    # the device.
    look = xp is np and target.shape[0] > 0
    dtype = accumulate_type(input.dtype) if look else torch.float64
    norms = _norms(input, linear_weight, target, dtype)
    low = 0.0
    if look:
        low, high = (bound.item() for bound in norms.aminmax())
        if not (low >= _SAFE_NORMS[0] and high <= _SAFE_NORMS[1]):
            dtype, plain, low = torch.float64, None, 0.0
            norms = _norms(input, linear_weight, target, dtype)
    a, b = vector(norms)
    if low == 0:
        undefined = (a == 0) | (b == 0)
        a, b = xp.where(undefined, 1.0, a), xp.where(undefined, 1.0, b)
    s = a * b
    if look and plain is not None:
        c = vector(plain) / s
        if c.max() > _NEAR:
            near = np.flatnonzero(c > _NEAR)
            rows = torch.as_tensor(near)
            x, y = input.index_select(0, rows), target.index_select(0, rows)
            c[near] = _near_cosines(x, linear_weight, y, a[near], b[near], dtype)
    else:
        c = _near_cosines(input, linear_weight, target, a, b, dtype)

    p, dp = psi_and_derivative(c, margin)
    weight = np.float64(lam.item()) if xp is np else lam.double()
    share = 1.0 / (1.0 + weight)
    f = s * (p + weight * c) * share
    alpha = (dp + weight) * share
    q = (p - c * dp) * share
    ratio = b / a
    beta, gamma = q * ratio, q / ratio
    if low == 0:
        f, beta, gamma, c = (xp.where(undefined, 0.0, value) for value in (f, beta, gamma, c))
        alpha = xp.where(undefined, 1.0, alpha)
    return f, alpha, beta, gamma, c
