"""The public entries as the fuzzer sees them: how they are called, and with what."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsoftmax
from fuzz_judges import (
    anything,
    judge_committed,
    judge_layer,
    judge_logits,
    judge_loss,
    judge_plan,
    judge_psi,
    judge_schedule,
    judge_stats,
    judge_taken_over,
    judge_words,
    require,
)
from lsoftmax import functional, reference
from lsoftmax.distributed import ClassParallelLSoftmaxLoss

N, D, C = 4, 3, 5
Make = Callable[[], Any]

# Anything for any argument. No large numbers that a size or a margin could take: memory and time
# of that order would be spent as asked.
ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 2**62, 2**63, -(2**63) - 1, 2**70, 10**400),
    *(0.5, 1.5, -0.5, 1e-320, 1e39, -1e300, float("nan"), float("inf"), -float("inf"), 2j),
    *(
        "",
        "mean",
        "cpu",
        "nowhere",
        b"4",
        [],
        [1],
        (),
        {},
        set(),
        object(),
        int,
        len,
        ...,
        range(3),
    ),
    *(np.int64(3), np.float32(0.5), np.float64(0.5), np.zeros(3), np.array(2), Fraction(1, 2)),
    *(torch.float32, torch.int64, torch.complex64, torch.device("cpu"), torch.device("meta")),
]


def tensors() -> list[Tensor]:
    """Tensors of every kind and of shapes that mostly do not fit."""
    x = torch.randn(N, D)
    return [
        *(x, x.double(), x.half(), x.bfloat16(), x.long(), x.bool(), x.to(torch.complex64)),
        *(
            x[0],
            x[:0],
            x[:, :0],
            x[None],
            x[0, 0],
            x.t(),
            x.t().contiguous().t(),
            x.expand(2, N, D),
        ),
        *(x.to("meta"), x.to_sparse(), x.to_sparse_csr(), x.clone().requires_grad_()),
        *(x * float("nan"), x * 1e30, x * 1e-30, torch.zeros(N, D), torch.full((N, D), -torch.inf)),
        *(torch.arange(N), torch.arange(N).int(), torch.full((N,), C), torch.full((N,), -100)),
        *(torch.full((N,), -1), torch.tensor(2), torch.tensor(2**62), torch.arange(2)[:, None]),
        *(torch.tensor(0.5), torch.tensor(-1.0), torch.tensor(float("inf")), torch.rand(C)),
        *(torch.zeros(C), torch.rand(C).double(), torch.rand(C).to_sparse(), torch.rand(C + 1)),
        torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        torch.nn.Parameter(torch.randn(C, D)),
    ]


@dataclass
class Entry:
    """A public function: arguments that are right, and what its result must be then."""

    name: str
    call: Callable[..., Any]
    good: dict[str, Make]
    judge: Callable[[dict[str, Any], Any], None]
    # Words of errors that are not ours, each with the reason why they may stand.
    theirs: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        return {name: make() for name, make in self.good.items()}


MATRICES: dict[str, Make] = {
    "input": lambda: torch.randn(N, D),
    "linear_weight": lambda: torch.randn(C, D),
    "target": lambda: torch.randint(C, (N,)),
    "margin": lambda: random.choice((1, 2, 4, 9)),
    "lam": lambda: random.choice((0.0, 1.5, torch.tensor(0.5))),
}
OPTIONS: dict[str, Make] = {
    "weight": lambda: random.choice((None, torch.rand(C))),
    "reduction": lambda: random.choice(("mean", "sum", "none")),
    "ignore_index": lambda: random.choice((-100, 0)),
    "label_smoothing": lambda: random.choice((0.0, 0.1, 1)),
}
BUDGET: dict[str, Make] = {"memory_budget": lambda: random.choice((None, 1, 200, 10**6))}
SCHEDULE: dict[str, Make] = {
    "minimum": lambda: 0.5,
    "keep": lambda: random.choice((0.0, 0.6)),
    "auto_step": lambda: True,
}
LAYER: dict[str, Make] = {
    "in_features": lambda: D,
    "margin": lambda: 3,
    "lam": lambda: random.choice((None, 0.5, lsoftmax.LambdaSchedule(10, 1, 1))),
    "device": lambda: None,
    "dtype": lambda: None,
}
# torch's: what a device is, and that there is no room for 2^62 numbers.
DEVICE = r"[Dd]evice|\bmeta\b|CUDA|NVIDIA"
ANY = ("",)
SIZE = r"size|[Oo]verflow|allocate|memory|long"


def annealed(method: str) -> Callable[..., Any]:
    """A method of a schedule: one that failed has changed nothing."""

    def call(**arguments: Any) -> Any:
        schedule = lsoftmax.LambdaSchedule.by_angle()
        before = [state.clone() for state in schedule.buffers()]
        try:
            getattr(schedule, method)(**arguments)
        except Exception:
            same = all(map(torch.equal, before, schedule.buffers()))
            require(same, "a step that failed has changed the schedule")
            raise
        return schedule

    return call


def entries(distributed: bool) -> list[Entry]:
    stats = lsoftmax.margin_stats(torch.randn(N, D), torch.randn(C, D), torch.zeros(N).long())
    cosines = {"cos_theta": lambda: torch.rand(N) * 2 - 1, "margin": MATRICES["margin"]}
    steps = {"total_steps": lambda: random.choice((1, 100, 10**6)), **SCHEDULE}
    curve = {
        "base": lambda: 1000.0,
        "gamma": lambda: random.choice((0, 0.1)),
        "power": lambda: random.choice((0, 2.0)),
        **SCHEDULE,
    }
    everything = {**MATRICES, **OPTIONS, **BUDGET}
    loss_layer = {**LAYER, "num_classes": lambda: C, **OPTIONS, **BUDGET}
    all_entries = [
        Entry("lsoftmax_loss", functional.lsoftmax_loss, everything, judge_loss),
        Entry("lsoftmax_linear", functional.lsoftmax_linear, MATRICES, judge_logits),
        Entry(
            "psi",
            functional.psi,
            cosines,
            judge_psi,
        ),
        Entry(
            "plan",
            functional.plan,
            {name: everything[name] for name in PLAN},
            judge_plan,
        ),
        Entry("LambdaSchedule", lsoftmax.LambdaSchedule, curve, judge_schedule),
        Entry("for_steps", lsoftmax.LambdaSchedule.for_steps, steps, judge_schedule),
        Entry("by_angle", lsoftmax.LambdaSchedule.by_angle, SCHEDULE, judge_schedule),
        Entry("LSoftmaxLoss", lsoftmax.LSoftmaxLoss, loss_layer, judge_layer, (DEVICE, SIZE)),
        Entry(
            "LSoftmaxLinear",
            lsoftmax.LSoftmaxLinear,
            {**LAYER, "out_features": lambda: C},
            judge_layer,
            (DEVICE, SIZE),
        ),
        Entry("commit", annealed("commit"), {"lam": lambda: torch.tensor(2.0)}, judge_committed),
        Entry(
            "observe",
            annealed("observe"),
            {"cosine": lambda: torch.rand(()), "margin": MATRICES["margin"]},
            judge_schedule,
        ),
        Entry(
            "from_published",
            lsoftmax.from_published,
            {
                "source": lambda: {"weight": torch.randn(D, C)},
                "layer": lambda: random.choice((lsoftmax.LSoftmaxLinear, lsoftmax.LSoftmaxLoss)),
                "margin": lambda: 3,
                "lam": LAYER["lam"],
                "prefix": lambda: "",
            },
            judge_taken_over,
        ),
        Entry("margin_stats", lsoftmax.margin_stats, MATRICES, judge_stats),
        Entry(
            "LSoftmaxLoss.margin_stats",
            lsoftmax.LSoftmaxLoss(D, C, margin=3).margin_stats,
            {name: MATRICES[name] for name in ("input", "target")},
            lambda a, result: judge_stats({"margin": 3}, result),
        ),
        Entry("collapse_warning", lsoftmax.collapse_warning, {"stats": lambda: stats}, judge_words),
        # The specification is plain torch and checks nothing: all errors are torch's and Python's.
        *(
            Entry(f"reference.{f.__name__}", f, arguments, anything, ANY)
            for f, arguments in (
                (reference.psi, cosines),
                (reference.lsoftmax_loss, {**MATRICES, **OPTIONS}),
                (reference.lsoftmax_linear, MATRICES),
            )
        ),
    ]
    if distributed:
        more = {
            "process_group": lambda: None,
            "sample_rate": lambda: random.choice((1.0, 0.5)),
            "seed": lambda: 1,
            "max_local_batch": lambda: None,
            "averaged": lambda: True,
        }
        all_entries.append(
            Entry(
                "ClassParallelLSoftmaxLoss",
                ClassParallelLSoftmaxLoss,
                {**loss_layer, **more},
                judge_layer,
                (DEVICE, SIZE),
            )
        )
    return all_entries


PLAN = ("input", "linear_weight", "reduction", "memory_budget", "label_smoothing")


class Forward:
    """A layer's forward: one that failed is no training step."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer
        self.before = self.state()

    def state(self) -> list[Tensor]:
        state = self.layer.state_dict().values()
        return [(t.to_local() if hasattr(t, "to_local") else t).clone() for t in state]

    def __call__(self, **arguments: Any) -> Any:
        self.before = self.state()
        return self.layer(**arguments)

    def assert_untouched(self) -> None:
        same = all(torch.equal(a, b) for a, b in zip(self.before, self.state(), strict=True))
        require(same, "a forward that failed has changed parameters or schedule")
