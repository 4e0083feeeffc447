"""What the harness asks of an implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]  # of x, w, y, margin, lam


class UnsupportedError(Exception):
    """Raised by a provider that does not take such inputs; the text says which."""


@dataclass(frozen=True)
class Bound:
    """A loss bound to its inputs."""

    loss: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor]  # features (N, D); weights (C, D), or (D, C) if `transposed`
    transposed: bool = False

    def evaluate(self) -> Tensor:
        """The loss alone, without gradients."""
        with torch.no_grad():
            return self.loss()

    def step(self, scale: float = 1.0) -> tuple[Tensor | None, ...]:
        """The gradients of `scale * loss`; None for one that is not produced."""
        loss = self.loss()
        if not loss.requires_grad:
            return None, None
        upstream = None if scale == 1 else torch.full_like(loss, scale)
        return torch.autograd.grad(loss, self.leaves, upstream, allow_unused=True)


class Provider:
    """What every provider answers; the ones below say where they differ."""

    name: str
    loss: Loss  # of one that has no `bind` of its own
    requires: str | None = None  # the module it comes from
    package: str | None = None  # what pip calls that
    cuda_only = False
    slow_start = False  # compiles or tunes first: not part of a quick run
    limit = False  # not a loss: a bound to compare with
    profiled = False  # its kernels are listed, which takes longer than anything else untimed
    arrays = 4.0  # N x C arrays at its peak, for the estimate on a CPU
    types = ("float32", "float64", "float16", "bfloat16")

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        return Bound(partial(self.loss, x, w, y, margin, lam), (x, w))

    def computes(self, margin: int, lam: float) -> tuple[int, float]:
        """The margin and lam of the loss that it gives when asked for these."""
        return margin, lam

    def installed(self) -> bool:
        return self.requires is None or importlib.util.find_spec(self.requires) is not None

    def why_not(self, device_type: str, dtype: str) -> str | None:
        """Why it cannot run on such inputs, or None."""
        if self.cuda_only and device_type != "cuda":
            return "needs CUDA"
        if dtype not in self.types:
            return f"takes {' and '.join(self.types)} only"
        return None
