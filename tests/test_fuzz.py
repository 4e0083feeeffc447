"""The fuzzer of the public entries, in a process of its own: a crash or a hang is a red test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Calls, by what runs the ops: in the ordinary test command, and nightly.
CALLS = {"portable": (1000, 10_000), "emulation": (150, 2000), "sanitized": (100, 500)}


@pytest.mark.parametrize(
    "nightly", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["ordinary", "nightly"]
)
def test_fuzz(nightly: bool, device: str, backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "cuda":
        pytest.skip("a target outside [0, C) ends the CUDA context of the process")
    calls, seed = CALLS[backend][nightly], str(request.config.getoption("--seed"))
    command = [sys.executable, "fuzz.py", "--calls", str(calls), "--seed", seed]
    run = subprocess.run(
        [*command, "--backend", backend],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{run.returncode}: {run.stderr[-6000:]}"
    result = json.loads(run.stdout)
    assert result["found"] == []
    totals = [sum(counts.get(what, 0) for counts in result["counts"].values())
              for what in ("refused", "right")]  # fmt: skip
    assert sum(totals) == calls
    assert min(totals) > calls / 10, "arguments were nearly all right, or nearly all wrong"
