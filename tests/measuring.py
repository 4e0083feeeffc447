"""One short measurement on the CPU, for the tests of the harness that measures."""

from __future__ import annotations

import torch

import harness  # noqa: F401  (makes `import benchmarks` work)
from benchmarks import floors
from benchmarks.cases import Case
from benchmarks.provider import Provider
from benchmarks.providers import Function
from benchmarks.run import Settings, measure

CPU = torch.device("cpu")
LIMITS = {"bandwidth": 1e10, "flops": dict.fromkeys(floors.SIZES, 1e11)}
CASE = Case(n=24, d=6, c=130, dtype="float32", margin=3)  # more classes than are compared


def run(*providers: Provider, case: Case = CASE, **changes) -> dict[str, dict]:
    """The rows of one short measurement, by provider."""
    options = {"passes": list(floors.PASSES), "graph": False, "cold": False, "quick": True}
    options |= {"seconds": 1e-3, "rounds": 1, "providers": [], "lam": 2.0, "threads": 1}
    settings = Settings(device="cpu", **(options | changes))
    return {row["provider"]: row for row in measure(case, providers, settings, LIMITS)}


def named(name: str, loss) -> Function:
    return Function(name, loss, arrays=1)
