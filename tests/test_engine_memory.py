"""What the engine holds that is N x C, against what the plan says: on the emulation, where arrays
are counted and nothing is computed.
"""

from __future__ import annotations

import pytest
import torch

from allocations import peak
from emulation import build
from lsoftmax import autograd
from lsoftmax.plan import Plan, choose

CUDA = torch.device("cuda")
D = 8  # few features: what is N x D or C x D is little beside the rest
MB = 1 << 20


@pytest.fixture(autouse=True)
def _on_the_emulation(backend: str, device: str) -> None:
    if backend != "emulation":
        pytest.skip("needs --backend emulation")


def held(n: int, c: int, dtype: torch.dtype, plan: Plan, smoothing: float) -> int:
    """The peak of a step on the GPU, above its gradients. The emulation alone widens 16-bit factors
    of a product that is wider, of E by 4 bytes a logit: in backward, or, with chunks of rows, in
    forward.
    """
    x, w = (torch.empty(rows, D, dtype=dtype).requires_grad_() for rows in (n, c))
    y, lam = torch.zeros(n, dtype=torch.int64), torch.zeros(())

    def forward() -> torch.Tensor:
        return autograd.loss(x, w, y, 4, lam, None, 1, -100, smoothing, plan)[0]

    def step() -> None:
        torch.autograd.grad(forward(), (x, w))

    with build.stubbed(build.load()):
        if plan[:2] == (0, 0):  # more in forward, with logits beside E, than later
            return peak(forward)
        gradients = (n + c) * D * dtype.itemsize
        widened = 4 * (plan.row_chunk or n) * (plan.class_chunk or c)
        backward = peak(step) - gradients - (widened if dtype == torch.bfloat16 else 0)
        return backward if plan.row_chunk else max(peak(forward), backward)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "c", "budget"),
    [
        (3000, 16_000, 1000 * MB),  # all of it
        (80_000, 300, 200 * MB),  # as much beside the exponentials as they take
        (1000, 40_000, 40 * MB),  # chunks of classes
        (1000, 40_000, 4 * MB),  # of too few for the forward pass in one kernel
        (2000, 1_000_000, 20 * MB),  # of fewer than that needs for each row
        (6000, 10_000, 60 * MB),  # of rows, if the exponentials alone are kept
        (6000, 10_000, 120 * MB),  # of rows in every type
    ],
)
def test_the_plan_counts_what_is_held(
    n: int, c: int, budget: int, dtype: torch.dtype, smoothing: float
) -> None:
    fused = dtype == torch.bfloat16 and smoothing == 0
    plan = choose(n, D, c, dtype, CUDA, scalar=True, memory_budget=budget, fused=fused)
    measured = held(n, c, dtype, plan, smoothing)
    print(plan, f"{measured / plan.bytes:.3f} {measured / budget:.3f}")
    assert 0.9 * plan.bytes <= measured <= 1.1 * plan.bytes
    assert plan.bytes <= 1.1 * budget
