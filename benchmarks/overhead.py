"""The host's time of a step: forward and backward with kernels that do nothing.

    python -m benchmarks.overhead

On CPU tensors, through the emulation of CUDA kept with the tests, whose launches here return at
once: what is left is Python, the dispatcher and the engine's C++, as on a GPU but for the launches
themselves. The three matrix products alone are taken off; so
F.cross_entropy(F.linear(x, W), y) in plain torch, which does compute, stands beside as a yardstick
of the machine, not of the layer. Needs a C++ compiler, no GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
    """A step of the layer and of the function, the ops they come down to, the products within."""
    x = torch.randn(n, d, dtype=dtype, requires_grad=True)
    y = torch.randint(c, (n,))
    layer = LSoftmaxLoss(d, c, dtype=dtype)
    w, lam = layer.linear.weight, torch.zeros(())

    def whole() -> None:
        torch.autograd.grad(layer(x, y), (x, w))

    def function() -> None:
        torch.autograd.grad(functional.lsoftmax_loss(x, w, y, 4, lam), (x, w))

    fixed = (x.detach(), w.detach(), y)
    one = torch.ones(())

    def ops() -> None:
        saved = torch.ops.lsoftmax.loss_fwd(*fixed, 4, lam, None, 1, -100, 0.0, True, 0)
        rest = (-100, 0.0, 0, True, True)
        torch.ops.lsoftmax.loss_bwd(one, *fixed, None, *saved[1:4], *rest)

    wide, w_wide = fixed[0].float(), fixed[1].float()
    z, dx, dw = torch.empty(n, c), torch.empty(n, d), torch.empty(c, d)

    def products() -> None:
        torch.mm(wide, w_wide.t(), out=z)
        torch.mm(z, w_wide, out=dx)
        torch.mm(z.t(), wide, out=dw)

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(x, w), y), (x, w))

    return {
        "layer": whole,
        "function": function,
        "ops": ops,
        "products": products,
        "plain": plain,
    }


def main() -> None:
    torch.set_num_threads(1)
    print("Microseconds of forward + backward, median (least), kernels left out, float32:\n")
    names = ("layer", "function", "its ops", "their three products", "F.cross_entropy")
    print(f"| N, D, C | {' | '.join(names)} | Python | C++ |")
    print("|---" * (len(names) + 3) + "|")
    with build.stubbed(build.load()):
        for shape in SHAPES:
            times = microseconds(steps(*shape, torch.float32))
            middle = {name: statistics.median(values) for name, values in times.items()}
            least = {name: min(values) for name, values in times.items()}

            def cell(of: Callable[[dict], float], m: dict = middle, s: dict = least) -> str:
                return f"{of(m):.0f} ({of(s):.0f})"

            cells = [cell(lambda t, name=name: t[name]) for name in times]
            cells.append(cell(lambda t: t["function"] - t["ops"]))
            cells.append(cell(lambda t: t["ops"] - t["products"]))
            print(f"| {', '.join(map(str, shape))} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
