"""`make gpu-check` without a GPU: stand-ins for Python, compute-sanitizer and nvidia-smi."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gpu_check.sh")
# Says each of its words, and what concerns it of the environment.
PYTHON = """#!/bin/bash
case "$*" in *--collect-only*) printf "tests/test_%s.py::a\n" loss loss fused_forward; exit;; esac
printf '<%s>' "$@"; echo " fused forward: ${LSOFTMAX_FUSED_FORWARD:-}"
case "$*" in *"$HANGS"*) [ -z "$HANGS" ] || exec sleep 30;; esac
case "$*" in *"$FAILS"*) [ -z "$FAILS" ] || exit 1;; esac
"""
SANITIZER = """#!/bin/bash
[ "$2" != initcheck ] || cat "$REPORTS"
echo "6 passed"
"""
REPORT = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void {}<float>(float*)+0x1f0
"""


@pytest.fixture
def check(tmp_path: Path):
    """``check(reports, seconds, **environment)`` runs the script: its exit status and output."""
    (tmp_path / "bin").mkdir()
    for name, text in {
        "python": PYTHON, "compute-sanitizer": SANITIZER, "nvidia-smi": "#!/bin/bash\n",
    }.items():  # fmt: skip
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(reports: str = "", seconds: float = 60, **environment: str) -> tuple[int, str]:
        (tmp_path / "reports").write_text(reports)
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CUDA_HOME": str(tmp_path),
            "REPORTS": str(tmp_path / "reports"), "HANGS": "", "FAILS": "", **environment,
        }  # fmt: skip
        deadline = str(int(time.time() + seconds))
        command = [SCRIPT, tmp_path / "bin" / "python", tmp_path, deadline]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


def test_what_libraries_leave_uninitialised_does_not_count(check) -> None:
    """As many reports as there are: a pipe that is closed early must not pass for a finding."""
    others = REPORT.format("cublas::gemm") * 20_000
    status, output = check(others)
    assert status == 0, output
    assert output.endswith("All passed.\n")
    inlined = REPORT.replace("void {}<float>(float*)", "/home/csrc/block.cuh:53:load_pack<float>")
    for ours in (REPORT.format("lsoftmax::loss_rows_kernel"), inlined):
        status, output = check(ours + others)
        assert status == 1
        assert output.count("initcheck.txt") == 1, output
    assert "memcheck.txt" not in output


def test_words_in_quotes_stay_whole(check) -> None:
    status, output = check(PYTEST_ARGS='-x -k "edges or loss"')
    assert status == 0
    assert output.count("<-x><-k><edges or loss>") == 2


def test_what_fails_stops_nothing_else(check) -> None:
    status, output = check(FAILS="--backend cuda test_fused_forward.py")
    assert status == 1
    assert output[output.index("FAILED:") :].count("\n") == 2  # that line, and this file
    assert "<--backend><cuda><test_loss.py>" in output
    assert "<benchmarks><--quick>" in output
    assert "fused forward: 0" in output  # the benchmarks leave it out


def test_a_step_that_hangs_ends_with_its_time(check) -> None:
    start = time.time()
    status, output = check(seconds=2, HANGS="--backend cuda test_loss.py")
    assert time.time() - start < 10  # else killed
    assert status == 1
    failed = output[output.index("FAILED:") :]
    assert "test_loss, see" in failed
    assert "benchmarks" not in failed
