"""Short measurements on the CPU, for the tests of the harness that measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import harness  # noqa: F401  (makes `import benchmarks` work)
from benchmarks import floors, results
from benchmarks.cases import Case
from benchmarks.provider import Provider
from benchmarks.providers import OURS, PRODUCTS, Function
from benchmarks.run import Settings, measure

CPU = torch.device("cpu")
LIMITS = {"bandwidth": 1e10, "flops": dict.fromkeys(floors.SIZES, 1e11)}
CASE = Case(n=24, d=6, c=130, dtype="float32", margin=3)  # more classes than are compared


def settings_for(device: torch.device, **changes) -> Settings:
    """Of a short measurement."""
    options = {"passes": list(floors.PASSES), "graph": False, "cold": False, "quick": True}
    options |= {"seconds": 1e-3, "rounds": 1, "providers": [], "lam": 2.0, "threads": 1}
    return Settings(device=str(device), **(options | changes))


def run(*providers: Provider, case: Case = CASE, lost=None, **changes) -> dict[str, dict]:
    """The rows of one short measurement, by provider."""
    rows = measure(case, providers, settings_for(CPU, **changes), LIMITS, lost=lost or {})
    return {row["provider"]: row for row in rows}


def named(name: str, loss) -> Function:
    return Function(name, loss, arrays=1)


# ---- the command line, whose imports not every environment has ----------------------------------

SHAPES = ["9,4,12", "9,4,30", "9,4,80", "5,4,30", "20,4,30"]


def command_line(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *providers: Provider,
    output: str = "run.json",
    resume: str = "",
) -> dict:
    """The result of a quick run of the products, ours and these, on small shapes."""
    from benchmarks import __main__ as command

    limits = {"bandwidth": 1e10, "flops": {"float32": 1e11}}
    monkeypatch.setattr(command, "measure_limits", lambda device, types: limits)
    monkeypatch.setattr(command, "PROVIDERS", [PRODUCTS, OURS, *providers])
    path = folder / (resume or output)
    new = ["--device", "cpu", "--quick", "--rounds", "1", "--threads", "1", "--seconds", "1e-3"]
    new += ["--output", str(path), "--shapes", *SHAPES, "--margins", "3", "1"]
    threads = torch.get_num_threads()
    try:
        command.main(["--resume", str(path)] if resume else new)
    finally:
        torch.set_num_threads(threads)
    return results.load(path)


def check(result: dict) -> None:
    """Against the schema of such files."""
    import jsonschema

    schema = json.loads(results.SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(result, schema)
