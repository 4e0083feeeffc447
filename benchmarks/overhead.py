"""The host's time of a step: forward and backward with kernels that do nothing.

    python -m benchmarks.overhead

On CPU tensors, through the emulation of CUDA kept with the tests, whose launches and matrix
products here return at once: what is left is Python, the dispatcher and the engine's C++, as on a
GPU but for the launches themselves. An autograd.Function that only saves as many tensors shows what
any of them costs; F.cross_entropy(F.linear(x, W), y) in plain torch, which does compute,
stands beside as a yardstick of the machine, not of the layer. Needs a C++ compiler, no GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from emulation import build
from lsoftmax import LSoftmaxLoss, functional

SHAPES = ((512, 2, 10), (256, 512, 10))


def microseconds(
    steps: dict[str, Callable[[], object]], samples: int = 300, calls: int = 10
) -> dict[str, list[float]]:
    """Of one call of each, in each of many samples, turn and turn about."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(samples):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(calls):
                step()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return times


def steps(n: int, d: int, c: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A step of the layer and of the function, the ops they come down to, and yardsticks."""
    x = torch.randn(n, d, dtype=dtype, requires_grad=True)
    y = torch.randint(c, (n,))
    layer = LSoftmaxLoss(d, c, dtype=dtype)
    w, lam = layer.linear.weight, torch.zeros(())

    def whole() -> None:
        torch.autograd.grad(layer(x, y), (x, w))

    def function() -> None:
        torch.autograd.grad(functional.lsoftmax_loss(x, w, y, 4, lam), (x, w))

    constant = LSoftmaxLoss(d, c, lam=1.0, dtype=dtype)
    v = constant.linear.weight

    def unannealed() -> None:
        torch.autograd.grad(constant(x, y), (x, v))

    fixed = (x.detach(), w.detach(), y)
    one = torch.ones(())

    def forward_op() -> tuple[torch.Tensor, ...]:
        return torch.ops.lsoftmax.loss_fwd(*fixed, 4, lam, None, 1, -100, 0.0, True, 0)

    def ops() -> None:
        saved = forward_op()
        rest = (-100, 0.0, 0, True, True)
        torch.ops.lsoftmax.loss_bwd(one, *fixed, None, *saved[1:4], *rest)

    made = forward_op()
    gradients = tuple(torch.empty_like(matrix) for matrix in fixed[:2])

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, w, y, None, *made[1:4])
            return made[0].detach()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            assert len(ctx.saved_tensors) == 7
            return *gradients, None

    def nothing() -> None:
        torch.autograd.grad(Nothing.apply(x, w, y), (x, w))

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(x, w), y), (x, w))

    return {
        "layer": whole,
        "layer, constant lam": unannealed,
        "function": function,
        "its ops": ops,
        "autograd.Function that only saves": nothing,
        "F.cross_entropy, computing": plain,
    }


def main() -> None:
    torch.set_num_threads(1)
    print("Microseconds of forward + backward, median (least), without kernels, float32:\n")
    with build.stubbed(build.load()):
        for shape in SHAPES:
            times = microseconds(steps(*shape, torch.float32))
            if shape == SHAPES[0]:
                print(f"| N, D, C | {' | '.join(times)} |")
                print("|---" * (len(times) + 1) + "|")
            cells = [f"{statistics.median(row):.0f} ({min(row):.0f})" for row in times.values()]
            print(f"| {', '.join(map(str, shape))} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
