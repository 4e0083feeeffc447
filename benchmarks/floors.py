"""The least time: bytes and operations counted, against rates measured in the same run.

`least` holds for any implementation: it must read inputs, write gradients and take its matrix
products. `kernels` is what each kernel of ours must move besides, so that a profile can be read
against it line by line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cases import Case
from .timing import Clock, clock_for

PASSES = ("forward", "forward_backward")
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# Our N x C array: what the forward product writes, and what backward reads (docs/design.md).
LOGIT_SIZES = {"float64": 8, "float32": 4, "float16": 4, "bfloat16": 4}
E_SIZES = {"float64": 8, "float32": 4, "float16": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """What one kernel, or a whole step, must at least do."""

    name: str
    bytes: int
    flops: int = 0

    def seconds(self, limits: dict, dtype: str) -> float:
        """By the measured rates, whichever takes longer."""
        return max(self.bytes / limits["bandwidth"], self.flops / limits["flops"][dtype])


def least(case: Case, which: str) -> Work:
    """The least any implementation does in this pass: 2 N C D operations forward, 6 with backward.

    Inputs are read once; with backward each gradient is written once.
    """
    (n, d, c), size = case.shape, SIZES[case.dtype]
    inputs = (n + c) * d * size + 8 * n
    if which == "forward":
        return Work(which, inputs, 2 * n * c * d)
    return Work(which, inputs + (n + c) * d * size, 6 * n * c * d)


def kernels(case: Case, regime: str) -> list[Work]:
    """What our kernels do in one forward + backward, in their order.

    Regimes: "in budget" keeps one N x C array; "class chunks" never has it and takes the forward
    product twice; "row chunks" forms the gradients in forward, a chunk of rows at a time (one chunk
    here: every further one reads W and reads and writes dW once more).
    """
    (n, d, c), size = case.shape, SIZES[case.dtype]
    x, w, y = n * d * size, c * d * size, 8 * n
    logits, e = n * c * LOGIT_SIZES[case.dtype], n * c * E_SIZES[case.dtype]
    product = 2 * n * c * d
    touched = min(n, c) * d * size  # rows of dW that belong to a target

    forward = Work("logits = X W'", x + w + logits, product)
    read = Work("loss_rows, reading", 2 * x + y + logits)
    write = Work("loss_rows, logits to E", 2 * x + y + logits + e)
    backward = [
        Work("backward_rows", 2 * x),
        Work("dX = E W", e + w + x, product),
        Work("dW = E' X", e + x + w, product),
        Work("finish_gradients", 4 * x + 3 * touched),
    ]
    if regime == "in budget":
        return [forward, write, *backward]
    if regime == "class chunks":
        return [forward, read, forward, write, *backward]
    if regime == "row chunks":
        wide = Work("dW in float32, then rounded", c * d * (2 * 4 + size) if size < 4 else 0)
        return [forward, write, *backward, wide]
    raise ValueError(f"regime: expected one of {REGIMES}, got {regime!r}")


REGIMES = ("in budget", "class chunks", "row chunks")


def measure_limits(device: torch.device, types: set[str]) -> dict:
    """What this machine reaches: bytes/s of a large copy, operations/s of a large square product.

    The best of several, since they serve as limits. A copy reads and writes every byte.
    """
    on_gpu = device.type == "cuda"
    clock = clock_for(device)
    count = 2**31 if on_gpu else 2**28
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * count / _best(clock, lambda: target.copy_(source))
    flops = {}
    for dtype in sorted(types):
        side = (8192 if on_gpu else 2048) // (1 if SIZES[dtype] < 8 else 2)
        a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
        flops[dtype] = 2 * side**3 / _best(clock, lambda a=a: a @ a)
    return {"bandwidth": bandwidth, "flops": flops}


def _best(clock: Clock, function: Callable[[], object]) -> float:
    clock.seconds(function, 1)
    return min(clock.seconds(function, 1) for _ in range(9))
