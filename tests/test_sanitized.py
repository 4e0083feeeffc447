"""The emulated kernels and the engine under AddressSanitizer and UBSan, in their own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulation import build

pytestmark = pytest.mark.skipif(
    build.compiler() is None or not build.sanitizer_runtimes(),
    reason="no C++ compiler with sanitizers",
)
HERE = Path(__file__).parent

# One pass over every kernel, every edge of a row, and the engine's refusals: the whole files take
# minutes, and the emulator's own checks have seen them.
SELECTED = (
    "smoke or strides or peaks or engine_checks or not_finite or no_rows or out_of_range "
    "or 150-64-3"
)
FILES = ["test_loss.py", "test_edges.py", "test_linear.py", "test_errors.py"]
FILES += ["test_chunks.py", "test_distributed_ops.py", "test_annealing_ops.py"]
FILES += ["test_fused_forward.py", "test_class_cosines.py"]


@pytest.mark.parametrize(
    "selected",
    [
        pytest.param(["-k", SELECTED, *FILES], id="smoke"),
        pytest.param(["test_properties.py"], id="properties"),
        pytest.param(
            ["-m", "nightly", "test_properties.py", "test_fuzz.py"],
            id="nightly",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_kernels_under_sanitizers(selected: list[str], request: pytest.FixtureRequest) -> None:
    seed = str(request.config.getoption("--seed"))
    command = [sys.executable, "-m", "pytest", "-q", "--backend", "sanitized", "--seed", seed]
    environment = {**os.environ, **build.sanitizer_environment()}
    run = subprocess.run(
        [*command, *selected], cwd=HERE, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert " passed" in run.stdout
