"""Builds and installs the package in every supported way. `make test-install`; needs the network.

Each test gets an empty environment on top of a shared one that holds torch. The shared ones are
made here (a CPU build of torch; the newest torch with CUDA, and pip's nvcc), unless
LSOFTMAX_TEST_CPU_PYTHON and LSOFTMAX_TEST_CUDA_PYTHON name Pythons that have them, with setuptools
and ninja. Tests marked `compiles` take most of the time; `.ci/run` leaves them out.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lsoftmax
from environments import Environment, copy_source, make_base, run
from lsoftmax._toolkit import requirements

pytestmark = pytest.mark.install

CPU_TORCH, CUDA_TORCH = "torch==2.13.0", "torch"
compiles = pytest.mark.compiles


@pytest.fixture(scope="module")
def cpu_base(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("cpu"), CPU_TORCH, "LSOFTMAX_TEST_CPU_PYTHON")
    if "None" not in run(base, "-c", "import torch; print(torch.version.cuda)"):
        pytest.skip(f"{CPU_TORCH} is not a CPU build here: name one by LSOFTMAX_TEST_CPU_PYTHON")
    return base


@pytest.fixture(scope="module")
def cuda_base(tmp_path_factory):
    variable = "LSOFTMAX_TEST_CUDA_PYTHON"
    base = make_base(tmp_path_factory.mktemp("cuda"), CUDA_TORCH, variable)
    cuda = run(base, "-c", "import torch; print(torch.version.cuda)").strip()
    if cuda == "None":
        pytest.skip(f"{CUDA_TORCH} is a CPU build here: name one by {variable}")
    if variable not in os.environ:
        run(base, "-m", "pip", "install", *requirements(cuda))
    return base


@pytest.fixture
def cpu(tmp_path, cpu_base):
    return Environment(tmp_path / "cpu", cpu_base)


@pytest.fixture
def cuda(tmp_path, cuda_base):
    return Environment(tmp_path / "cuda", cuda_base)


@pytest.fixture
def source(tmp_path):
    return copy_source(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory, cuda_base):
    """The kernels built by a plain `pip install`, without a GPU: every architecture we support."""
    directory = tmp_path_factory.mktemp("built")
    environment = Environment(directory / "venv", cuda_base)
    environment.source = copy_source(directory)
    environment.output = environment.install(environment.source)
    return environment


@pytest.mark.parametrize(
    "isolation",
    [[], ["--no-build-isolation"], ["--no-build-isolation", "--no-index"]],
    ids=["isolated", "not-isolated", "offline"],
)
def test_cpu_torch(cpu, source, isolation):
    output = cpu.install(*isolation, source)
    assert "WITHOUT the CUDA kernels: torch 2" in output
    assert "not a CUDA build" in output
    assert "py3-none-any" in output
    report = cpu.report()
    assert "not built" in report
    assert ": CUDA" not in report
    assert not list(cpu.package.glob("_C*"))
    assert (cpu.package / "py.typed").exists()


def test_no_torch_yet(tmp_path, source):
    environment = Environment(tmp_path / "bare", None)
    output = environment.install(source)
    assert "WITHOUT the CUDA kernels: the build cannot import torch" in output
    assert "install torch first" in output


@compiles
def test_kernels_are_built_and_registered_without_a_gpu(built):
    assert "WITHOUT" not in built.output
    for arch in ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_120"):
        assert f"code={arch}" in built.output
    assert list(built.package.glob("_C*.so"))
    report = built.report()
    assert "kernels    loaded" in report
    assert "lsoftmax::loss_fwd: CUDA" in report
    assert "8.0;9.0a;10.0;12.0+PTX" in report


@compiles
def test_kernels_without_build_isolation_and_without_warnings(cuda, source):
    arch = {"TORCH_CUDA_ARCH_LIST": "9.0a", "LSOFTMAX_CUDA": "1", "LSOFTMAX_WERROR": "1"}
    output = cuda.install("--no-build-isolation", source, **arch)
    assert "code=sm_90" in output
    assert "sm_80" not in output
    assert "lsoftmax::loss_fwd: CUDA" in cuda.report()


@compiles
def test_kernels_in_place(cuda, cuda_base, source):
    if "lsoftmax" in run(cuda_base, "-m", "pip", "list"):
        pytest.skip(f"{cuda_base} has lsoftmax itself, which hides one that is installed in place")
    arch = {"TORCH_CUDA_ARCH_LIST": "9.0a", "LSOFTMAX_CUDA": "1"}
    cuda.install("--no-build-isolation", "-e", source, **arch)
    assert list((source / "lsoftmax").glob("_C*.so"))
    assert "kernels    loaded" in cuda.report()
    # Kernels left in the source tree neither stay in use nor ship once they are not asked for.
    cuda.install("--no-build-isolation", "-e", source, LSOFTMAX_CUDA="0")
    assert not list((source / "lsoftmax").glob("_C*.so"))
    assert "not built" in cuda.report()


@compiles
def test_kernels_by_wheels(cuda, cuda_base, source):
    homes = (Path(Environment.purelib(cuda_base)) / "nvidia").glob("cu*/bin/nvcc")
    home = next((nvcc.parents[1] for nvcc in homes), None)
    if home is None:
        pytest.skip(f"{cuda_base} has no nvcc of its own")
    arch = {"TORCH_CUDA_ARCH_LIST": "9.0a", "LSOFTMAX_CUDA": "1", "LSOFTMAX_WERROR": "1"}
    output = cuda.install(source, CUDA_HOME=str(home), **arch)
    assert f"{home}/bin/nvcc" in output
    assert "-l:libcudart.so." in output
    assert "kernels    loaded" in cuda.report()


def test_cuda_torch_without_nvcc(cuda, source):
    output = cuda.install(source, CUDA_HOME="/nonexistent")
    assert "WITHOUT the CUDA kernels: there is no nvcc in CUDA_HOME=/nonexistent" in output
    report = cuda.report()
    assert "there is no nvcc in CUDA_HOME=/nonexistent" in report  # long after pip said so
    assert "LSOFTMAX_CUDA=1 pip install" in report


@compiles
def test_no_kernels_from_an_earlier_build_ship(cuda, built):
    output = cuda.install(built.source, LSOFTMAX_CUDA="0")
    assert "LSOFTMAX_CUDA=0 asked for it" in output
    assert not list(cuda.package.glob("_C*"))
    assert "not built" in cuda.report()


def test_asked_for_kernels_without_torch(tmp_path, source):
    environment = Environment(tmp_path / "bare", None)
    output = environment.install(source, fails=True, LSOFTMAX_CUDA="1")
    assert "LSOFTMAX_CUDA=1 wants the kernels: the build cannot import torch" in output


def test_asked_for_kernels_with_cpu_torch(cpu, source):
    output = cpu.install(source, fails=True, LSOFTMAX_CUDA="1")
    assert "LSOFTMAX_CUDA=1 wants the kernels: torch 2" in output
    assert "not a CUDA build" in output


def test_asked_for_kernels_without_nvcc(cuda, source):
    output = cuda.install(source, fails=True, LSOFTMAX_CUDA="1", CUDA_HOME="/nonexistent")
    assert "LSOFTMAX_CUDA=1 wants the kernels: there is no nvcc" in output


def test_asked_for_kernels_with_nvcc_of_another_cuda(cuda, source, tmp_path):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.1'\n")
    nvcc.chmod(0o755)
    home = str(tmp_path / "toolkit")
    output = cuda.install(source, fails=True, LSOFTMAX_CUDA="1", CUDA_HOME=home)
    assert f"nvcc in {home} is of CUDA 9.2, torch 2" in output
    assert "set CUDA_HOME to a CUDA" in output


def test_asked_for_nonsense(cpu, source):
    output = cpu.install(source, fails=True, LSOFTMAX_CUDA="yes")
    assert "LSOFTMAX_CUDA must be unset, 0 or 1, not 'yes'" in output


@compiles
def test_kernels_of_another_torch(cpu, built):
    shutil.copytree(built.package, cpu.package)
    output = run(cpu.python, "-c", "import lsoftmax; print(lsoftmax.cuda_available())")
    assert output.count("RuntimeWarning") == 1
    assert "The kernels were built for torch 2" in output
    assert "(no CUDA). Reinstall lsoftmax" in output
    assert output.endswith("False\n")
    assert "built, not loaded" in run(cpu.python, "-m", "lsoftmax")


@compiles
def test_kernels_that_do_not_load(cpu, built):
    shutil.copytree(built.package, cpu.package)
    (cpu.package / "_build_info.json").unlink()  # so that nothing warns the loader
    output = run(cpu.python, "-c", "import lsoftmax; print(lsoftmax.cuda_available())")
    assert output.count("RuntimeWarning") == 1
    assert "The kernels were built but do not load (" in output
    assert output.endswith("False\n")


def test_sdist_and_wheel_hold_what_they_should_and_no_more(cpu, source, tmp_path):
    """Red for a file that MANIFEST.in or the list of packages forgets, or sweeps in."""
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    (source / "lsoftmax" / "_C.so").touch()  # what an editable install and a run leave behind
    (source / "lsoftmax" / "__pycache__").mkdir()
    (source / "lsoftmax" / "__pycache__" / "plan.pyc").touch()
    dist = tmp_path / "dist"
    build = f"import setuptools.build_meta as b; print(b.build_sdist({str(dist)!r}))"
    run("sh", "-c", f'cd "{source}" && "{cpu.python}" -c "{build}"')
    (sdist,) = dist.glob("*")
    name = f"lsoftmax-{lsoftmax.__version__}"
    assert sdist.name == f"{name}.tar.gz"
    with tarfile.open(sdist) as archive:
        packed = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    packed = {f for f in packed - made if not f.startswith("lsoftmax.egg-info/")}
    assert packed == files - {".ci/run", ".gitignore"}
    assert {"csrc/loss_rows.cu", "LICENSE", "setup.py", "tests/emulation/build.py"} <= packed

    run(*cpu.pip, "wheel", "--no-deps", "-w", dist, sdist, PATH=cpu.path)
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        metadata = archive.read(f"{name}.dist-info/METADATA").decode()
    package = {f for f in files if f.startswith("lsoftmax/")} | {"lsoftmax/_build_info.json"}
    records = ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt")
    assert packed == package | {f"{name}.dist-info/{record}" for record in records}
    assert {"lsoftmax/py.typed", "lsoftmax/__main__.py"} <= packed
    for line in ("Requires-Python: >=3.10", "Requires-Dist: torch>=2.9", "Requires-Dist: numpy"):
        assert f"\n{line}\n" in metadata
    cpu.install("--force-reinstall", wheel)
    assert "not built" in cpu.report()


# ---- compilers that are not there, or fail ------------------------------------------------------

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


# ---- what importing costs ------------------------------------------------------------------------


def test_import_time(cpu, source):
    """Beyond torch's own, in fresh interpreters: 0.1 s on an idle core. In seconds of CPU, so that
    it is the same on a busy machine.
    """
    cpu.install("--no-build-isolation", source)
    program = (
        "import time, torch; start = time.process_time(); import lsoftmax; "
        "print(time.process_time() - start)"
    )
    seconds = sorted(float(run(cpu.python, "-c", program)) for _ in range(5))
    print(f"import lsoftmax: {seconds[0]:.3f} s at best, {seconds[2]:.3f} s in the middle")
    assert seconds[2] < 0.3
