"""Builds and installs the package in every way it supports. `make test-install`; needs network."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

import lsoftmax
from install.environments import Environment, run

pytestmark = pytest.mark.install


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


def test_kernels_are_built_and_registered_without_a_gpu(built):
    assert "WITHOUT" not in built.output
    for arch in ("sm_80", "sm_90a", "sm_100", "compute_100", "sm_120", "compute_120"):
        assert f"code={arch}" in built.output
    assert list(built.package.glob("_C*.so"))
    report = built.report()
    assert "kernels    loaded" in report
    assert "lsoftmax::loss_fwd: CUDA" in report
    assert "8.0;9.0a;10.0+PTX;12.0+PTX" in report


def test_kernels_without_build_isolation_and_without_warnings(cuda, source):
    arch = {"TORCH_CUDA_ARCH_LIST": "9.0a", "LSOFTMAX_CUDA": "1", "LSOFTMAX_WERROR": "1"}
    output = cuda.install("--no-build-isolation", source, **arch)
    assert "code=sm_90" in output
    assert "sm_80" not in output
    assert "lsoftmax::loss_fwd: CUDA" in cuda.report()


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


def test_kernels_of_another_torch(cpu, built):
    shutil.copytree(built.package, cpu.package)
    output = run(cpu.python, "-c", "import lsoftmax; print(lsoftmax.cuda_available())")
    assert output.count("RuntimeWarning") == 1
    assert "The kernels were built for torch 2" in output
    assert "(no CUDA). Reinstall lsoftmax" in output
    assert output.endswith("False\n")
    assert "built, not loaded" in run(cpu.python, "-m", "lsoftmax")


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
