"""The fuzzer of the public entries, in a process of its own: a crash or a hang is a red test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Drawn calls, by what runs the ops: in the ordinary test command, and nightly.
CALLS = {"portable": (1000, 10_000), "emulation": (150, 2000), "sanitized": (100, 500)}


def fuzz(backend: str, request: pytest.FixtureRequest, *options: str) -> tuple[int, int, int]:
    """How many calls were refused, how many gave a right result, and how many a sweep has."""
    if backend == "cuda":
        pytest.skip("a target outside [0, C) ends the CUDA context of the process")
    seed = str(request.config.getoption("--seed"))
    run = subprocess.run(
        [sys.executable, "fuzz.py", *options, "--seed", seed, "--backend", backend],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{run.returncode}: {run.stderr[-6000:]}"
    result = json.loads(run.stdout.splitlines()[-1])  # gloo has its say before it
    assert result["found"] == []
    refused, right = (
        sum(counts.get(what, 0) for counts in result["counts"].values())
        for what in ("refused", "right")
    )
    return refused, right, result["sweep"]


@pytest.mark.parametrize(
    "nightly", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["ordinary", "nightly"]
)
def test_drawn(nightly: bool, device: str, backend: str, request: pytest.FixtureRequest) -> None:
    calls = CALLS.get(backend, (0, 0))[nightly]
    refused, right, _ = fuzz(backend, request, "--calls", str(calls))
    assert refused + right == calls
    assert min(refused, right) > calls / 10, "arguments were nearly all right, or nearly all wrong"


def test_sweep(device: str, backend: str, request: pytest.FixtureRequest) -> None:
    refused, right, calls = fuzz(backend, request, "--sweep")
    assert refused + right == calls
    assert calls > 5000
    assert right > 500
