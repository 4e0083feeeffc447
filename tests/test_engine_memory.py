"""What the engine holds that is N x C, against what the plan says: on the emulation, where arrays
are counted and nothing is computed, and on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from allocations import peak
from emulation import build
from lsoftmax import autograd, functional
from lsoftmax import plan as planning
from lsoftmax.plan import Plan, choose

CUDA = torch.device("cuda")
D = 8  # few features: what is N x D or C x D is little beside the rest
MB = 1 << 20

CASES = [
    (3000, 16_000, 1000 * MB),  # all of it
    (80_000, 300, 200 * MB),  # as much beside the exponentials as they take
    (1000, 40_000, 40 * MB),  # chunks of classes
    (1000, 40_000, 4 * MB),  # of too few for the forward pass in one kernel
    (2000, 1_000_000, 20 * MB),  # of fewer than that needs for each row
    (3000, 10_000, 2 * MB),  # of so few that what is O(N) counts
    (6000, 10_000, 60 * MB),  # of rows, if the exponentials alone are kept
    (6000, 10_000, 120 * MB),  # of rows in every type
    (80_000, 300, 60 * MB),  # with as much beside the exponentials
    (7000, 1700, 10 * MB),  # of too few rows for one kernel
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    """N, C and a budget."""
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[0.0, 0.1], ids=["", "smooth"])
def smoothing(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture(autouse=True)
def _no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LSOFTMAX_FUSED_FORWARD", raising=False)


def held(n: int, c: int, dtype: torch.dtype, plan: Plan, smoothing: float) -> int:
    """The peak of a step on the GPU, above its gradients. The emulation alone widens 16-bit factors
    of a product that is wider, of E by 4 bytes a logit: so forward and backward are looked at one
    by one.
    """
    x, w = (torch.empty(rows, D, dtype=dtype).requires_grad_() for rows in (n, c))
    options = (torch.zeros(n, dtype=torch.int64), 4, torch.zeros(()), None, 1, -100, smoothing)

    def forward() -> Tensor:
        return autograd.loss(x, w, *options, plan)[0]

    def forward_of_rows() -> Tensor:
        fixed = (x.detach(), w.detach(), *options, plan.row_chunk)
        return torch.ops.lsoftmax.loss_and_gradients(*fixed, False, False)[0]

    def step() -> None:
        torch.autograd.grad(forward(), (x, w))

    with build.stubbed(build.load()):
        if plan[:2] == (0, 0):  # more in forward, with logits beside E, than later
            return peak(forward)
        gradients = (n + c) * D * dtype.itemsize
        widened = 4 * (plan.row_chunk or n) * (plan.class_chunk or c)
        backward = peak(step) - gradients - (widened if dtype == torch.bfloat16 else 0)
        if plan.row_chunk:
            sums = 4 * (n + c) * D
            return max(peak(forward_of_rows) + sums, backward)
        return max(peak(forward), backward)


@pytest.mark.usefixtures("device")
def test_the_plan_counts_what_is_held(
    case: tuple[int, int, int],
    dtype: torch.dtype,
    smoothing: float,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n, c, budget = case
    if backend != "emulation":
        pytest.skip("needs --backend emulation")
    monkeypatch.setattr(planning, "fuses_forward", lambda device: True)
    options = {"scalar": True, "memory_budget": budget, "fusable": smoothing == 0}
    plan = choose(n, D, c, dtype, CUDA, **options)
    measured = held(n, c, dtype, plan, smoothing)
    print(plan, f"{measured / plan.bytes:.3f} {measured / budget:.3f}")
    assert 0.9 * plan.bytes <= measured <= 1.1 * plan.bytes
    assert plan.bytes <= 1.1 * budget


def test_a_gpu_holds_no_more(
    case: tuple[int, int, int], dtype: torch.dtype, smoothing: float, backend: str, device: str
) -> None:
    """Where the rule of the plan meets that of the kernels. A sort takes room of its own there, and
    torch rounds each array up: a large one by as much as 1 MB, where a rest is not worth splitting.
    """
    n, c, budget = case
    if backend != "cuda":
        pytest.skip("needs a GPU")
    x, w = (torch.randn(rows, D, device=device).to(dtype).requires_grad_() for rows in (n, c))
    y = torch.randint(c, (n,), device=device)
    options = {"memory_budget": budget, "label_smoothing": smoothing}

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(functional.lsoftmax_loss(x, w, y, **options), (x, w))

    step()  # what libraries take at first
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = sum(gradient.nbytes for gradient in step())
    measured = torch.cuda.max_memory_allocated() - before - gradients
    plan = functional.plan(x, w, **options)
    print(plan, f"{measured / plan.bytes:.3f} {measured / budget:.3f}")
    assert measured <= 1.2 * plan.bytes + 2 * MB
