"""Builds the package with compilers that are stand-ins: in no time, or not at all."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

from install.environments import Environment, run

pytestmark = pytest.mark.install

COMPILER = """#!/bin/sh
# Says what setup.py asks, and "compiles" whatever it is given to an empty file.
case "$*" in
  *--version*) echo "release {release}, V{release}.1"; exit 0;;
  *--list-gpu-arch*) echo compute_80; exit 0;;
  *-dumpfullversion*|*-dumpversion*) echo 12.2.0; exit 0;;
esac
{action}
"""
COMPILE = """while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2" || exit 1; fi
  shift
done"""
RUN_OUT = 'echo "fatal error: Killed signal terminated program cc1plus"; exit 1'


def make_compilers(directory: Path, python: Path, action: str) -> dict[str, str]:
    """Variables for setup.py, with which stand-ins compile in no time."""
    major = run(python, "-c", "import torch; print(torch.version.cuda.split('.')[0])").strip()
    tools = directory / "cuda toolkit" / "bin"
    tools.mkdir(parents=True)
    for name in ("nvcc", "c++", "g++", "gcc", "cc", "x86_64-linux-gnu-gcc", "x86_64-linux-gnu-g++"):
        (tools / name).write_text(COMPILER.format(release=f"{major}.9", action=action))
        (tools / name).chmod(0o755)
    return {"CUDA_HOME": str(tools.parent), "TORCH_CUDA_ARCH_LIST": "8.0", "tools": str(tools)}


def test_compilers_in_paths_with_spaces(tmp_path, cuda_base, source):
    """Source tree, environment and toolkit: every word reaches the compiler whole."""
    environment = Environment(tmp_path / "an environment", cuda_base)
    made = make_compilers(tmp_path, cuda_base, COMPILE)
    environment.path = f"{made.pop('tools')}:{environment.path}"
    environment.install("--no-build-isolation", source, LSOFTMAX_CUDA="1", **made)
    assert list(environment.package.glob("_C*.so"))
    report = run(environment.python, "-m", "lsoftmax")
    assert "built, not loaded" in report  # it is empty
    assert "compute capability 8.0" in report


def test_condas_toolkit(cuda, source, tmp_path):
    """Its headers and libraries lie where nvcc looks, but torch does not."""
    made = make_compilers(tmp_path, cuda.python, COMPILE)
    cuda.path = f"{made.pop('tools')}:{cuda.path}"
    home = Path(made.pop("CUDA_HOME"))
    target = "sbsa-linux" if platform.machine() == "aarch64" else f"{platform.machine()}-linux"
    (home / "targets" / target / "include").mkdir(parents=True)
    (home / "targets" / target / "include" / "cuda_runtime.h").touch()
    output = cuda.install("--no-build-isolation", source, LSOFTMAX_CUDA="1", **made)
    (compiled,) = {line for line in output.splitlines() if "-c " in line and "schedule.cpp" in line}
    assert f"-I{home}/targets/{target}/include" in compiled.replace("'", "").replace("\\", "")
    assert f"-L{home}/targets/{target}/lib" in output


def test_uv(cuda, source, tmp_path):
    """It hides torch from a build, unless it is told not to: then the report has its command."""
    made = make_compilers(tmp_path, cuda.python, COMPILE)
    path = f"{made.pop('tools')}:{cuda.path}"

    def install(*options, **variables):
        uv = [sys.executable, "-m", "uv", "pip", "install", "--python", cuda.python]
        run(*uv, *options, source, PATH=path, **made, **variables)
        return list(cuda.package.glob("_C*.so"))

    command = "uv pip install --no-build-isolation --no-deps --reinstall-package lsoftmax ."
    assert not install("--no-deps")
    assert f"LSOFTMAX_CUDA=1 {command}" in cuda.report()
    assert install("--no-deps", "--no-build-isolation")
    assert install(*command.split()[3:-1], LSOFTMAX_CUDA="1")
    report = run(cuda.python, "-m", "lsoftmax")
    assert "do not load (" in report, "the extension is empty"
    assert f"Reinstall lsoftmax under this torch: {command}" in report


@pytest.mark.parametrize("beside_python", [False, True])
def test_compiling_without_ninja_on_path(cuda, cuda_base, source, tmp_path, beside_python):
    """pip puts it beside Python: on PATH only where the environment is activated."""
    if beside_python:
        (cuda.python.parent / "ninja").symlink_to(cuda_base.parent / "ninja")
    made = make_compilers(tmp_path, cuda.python, COMPILE)
    without = [d for d in os.environ["PATH"].split(":") if not (Path(d) / "ninja").exists()]
    cuda.path = ":".join([made.pop("tools"), *without])
    output = cuda.install("--no-build-isolation", source, LSOFTMAX_CUDA="1", **made)
    assert ("there is no ninja, so one file is compiled at a time" in output) != beside_python
    assert list(cuda.package.glob("_C*.so"))


@pytest.mark.parametrize("asked", ["", "1"])
def test_no_cxx_compiler(cuda, source, tmp_path, asked):
    made = make_compilers(tmp_path, cuda.python, COMPILE)
    made |= {"CXX": str(tmp_path / "no compiler").replace(" ", "-"), "LSOFTMAX_CUDA": asked}
    del made["tools"]
    output = cuda.install("--no-build-isolation", source, fails=asked == "1", **made)
    assert "does not run (" in output
    assert "install a C++ compiler or set CXX" in output
    if asked != "1":
        assert "WITHOUT the CUDA kernels" in output
        assert "install a C++ compiler or set CXX" in cuda.report()


def test_compiler_that_runs_out_of_memory(cuda, source, tmp_path):
    made = make_compilers(tmp_path, cuda.python, RUN_OUT)
    cuda.path = f"{made.pop('tools')}:{cuda.path}"
    output = cuda.install("--no-build-isolation", source, fails=True, LSOFTMAX_CUDA="1", **made)
    assert "lsoftmax: compiling failed, the first error above says why." in output
    assert (
        "Where memory ran out: MAX_JOBS=1. Where nvcc does not support the C++ compiler: "
        "one that it does, as CC=gcc-14 CXX=g++-14. To do without kernels: LSOFTMAX_CUDA=0"
    ) in output
