"""Which CUDA toolkit the kernels are built with, and what is said where none fits."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lsoftmax import _toolkit
from lsoftmax._toolkit import NoKernelsError, find_toolkit, place_of_wheels

# Says its release; compiles nothing, or fails at it and says how it was called.
NVCC = """#!/bin/sh
case "$*" in
  --version) echo 'Cuda compilation tools, release {release}, V{release}.1'; exit {runs};;
  *) echo "{says} $*" >&2; exit {compiles};;
esac
"""


def toolkit(
    home: Path,
    release: str = "13.0",
    headers: bool = True,
    runs: int = 0,
    compiles: int = 0,
    says: str = "",
) -> Path:
    """A folder that looks like one; `runs` and `compiles` are exit codes of its nvcc."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(release=release, runs=runs, compiles=compiles, says=says))
    nvcc.chmod(0o755)
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    return home


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """One without CUDA."""
    for name in ("CC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(_toolkit, "USUAL", tmp_path / "usual")
    return monkeypatch


def torch_of(cuda: str | None, tmp_path: Path) -> SimpleNamespace:
    file = str(tmp_path / "site" / "torch" / "__init__.py")
    return SimpleNamespace(__version__="2.15.0", version=SimpleNamespace(cuda=cuda), __file__=file)


def put_on_path(machine, home: Path) -> None:
    machine.setenv("PATH", str(home / "bin"))


def test_by_name(machine, tmp_path):
    """Taken at its word, headers or not, whatever else there is."""
    torch_13 = torch_of("13.2", tmp_path)
    put_on_path(machine, toolkit(tmp_path / "on-path"))
    home = toolkit(tmp_path / "cuda", headers=False)
    machine.setenv("CUDA_HOME", str(home))
    assert find_toolkit(torch_13) == (home, "13.0")
    machine.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(
        NoKernelsError, match=f"no nvcc in CUDA_HOME={tmp_path}: .* or unset CUDA_H"
    ):
        find_toolkit(torch_13)


def test_by_nvcc_on_path(machine, tmp_path):
    home = toolkit(tmp_path / "cuda-13")
    link = tmp_path / "links" / "bin"
    link.mkdir(parents=True)
    (link / "nvcc").symlink_to(home / "bin" / "nvcc")
    put_on_path(machine, link.parent)
    assert find_toolkit(torch_of("13.2", tmp_path)) == (home, "13.0")


@pytest.mark.parametrize(
    ("architecture", "target"),
    [("x86_64", "x86_64-linux"), ("aarch64", "sbsa-linux"), ("aarch64", "aarch64-linux")],
)
def test_condas(machine, tmp_path, architecture, target):
    """Whose headers lie apart, for each kind of machine that it has them for."""
    machine.setattr("platform.machine", lambda: architecture)
    usual = toolkit(tmp_path / "usual")
    conda = toolkit(tmp_path / "conda", "13.1", headers=False)
    put_on_path(machine, conda)
    for name in ("other-linux", target):
        assert find_toolkit(torch_of("13.2", tmp_path)) == (usual, "13.0")
        folder = conda / "targets" / name / "include"
        folder.mkdir(parents=True)
        (folder / "cuda_runtime.h").touch()
    assert find_toolkit(torch_of("13.2", tmp_path)) == (conda, "13.1")
    assert _toolkit.headers(conda) == folder
    assert _toolkit.headers(usual) == usual / "include"


def test_behind_a_wrapper(machine, tmp_path):
    put_on_path(machine, toolkit(tmp_path / "wrapper", headers=False))
    usual = toolkit(tmp_path / "usual")
    assert find_toolkit(torch_of("13.2", tmp_path)) == (usual, "13.0")


@pytest.mark.parametrize("fault", [{"release": "12.9"}, {"release": "14.0"}, {"runs": 1}])
def test_the_first_that_fits(machine, tmp_path, fault):
    """What is not taken is not even asked: it may be broken."""
    torch_13 = torch_of("13.2", tmp_path)
    put_on_path(machine, toolkit(tmp_path / "unfit", **fault))
    usual = toolkit(tmp_path / "usual", "13.1")
    wheels = toolkit(place_of_wheels(torch_13), runs=1)
    assert find_toolkit(torch_13) == (usual, "13.1")
    (usual / "bin" / "nvcc").unlink()
    (wheels / "bin" / "nvcc").write_text(NVCC.format(release="13.2", runs=0, compiles=0, says=""))
    assert find_toolkit(torch_13) == (wheels, "13.2")


def test_wheels_that_do_not_fit_together(machine, tmp_path):
    torch_13 = torch_of("13.2", tmp_path)
    wheels = toolkit(place_of_wheels(torch_13), "13.2", compiles=1, says="ptxas fatal")
    machine.setenv("CC", "gcc-15")
    words = rf"wheels in {wheels} are not all there, or of several releases \(ptxas fatal .*"
    with pytest.raises(NoKernelsError, match=words + r"-ccbin gcc-15\): set CUDA_HOME"):
        find_toolkit(torch_13)


def test_wheels_whose_compiler_says_nothing(machine, tmp_path):
    torch_13 = torch_of("13.2", tmp_path)
    wheels = toolkit(place_of_wheels(torch_13), "13.2")
    (wheels / "bin" / "nvcc").write_text(
        NVCC.format(release="13.2", runs=0, compiles=3, says="").replace(">&2", ">/dev/null")
    )
    with pytest.raises(NoKernelsError, match=r"several releases \(exit code 3\): set CUDA_HOME"):
        find_toolkit(torch_13)


def test_a_cxx_compiler_too_new_is_no_fault_of_the_wheels(machine, tmp_path):
    torch_13 = torch_of("13.2", tmp_path)
    said = "host_config.h:137: error: #error -- unsupported GNU version! gcc later than 15"
    wheels = toolkit(place_of_wheels(torch_13), "13.2", compiles=1, says=said)
    assert find_toolkit(torch_13) == (wheels, "13.2")


@pytest.mark.parametrize(
    ("release", "cuda"), [("12.9", "13.2"), ("14.0", "13.2"), ("13.0", "12.8")]
)
def test_majors_must_agree(machine, tmp_path, release, cuda):
    home = toolkit(tmp_path / "usual", release)
    words = f"nvcc in {home} is of CUDA {release}, torch 2.15.0 is of CUDA {cuda}: set CUDA_HOME"
    with pytest.raises(NoKernelsError, match=words):
        find_toolkit(torch_of(cuda, tmp_path))


@pytest.mark.parametrize(
    ("release", "fits"), [("12.0", False), ("12.3", False), ("12.4", True), ("12.10", True)]
)
def test_the_oldest_toolkit(machine, tmp_path, release, fits):
    home = toolkit(tmp_path / "usual", release)
    torch_12 = torch_of("12.8", tmp_path)
    if fits:
        assert find_toolkit(torch_12) == (home, release)
        return
    words = f"nvcc in {home} is of CUDA {release}, at least 12.4 is needed: set CUDA_HOME to a"
    with pytest.raises(NoKernelsError, match=words):
        find_toolkit(torch_12)


WHEELS = (
    "nvidia-cuda-nvcc~=13.2.0 nvidia-nvvm~=13.2.0 nvidia-cuda-crt~=13.2.0 nvidia-cuda-cccl~=13.2.0"
)


@pytest.mark.parametrize(
    ("cuda", "remedy"),
    [("13.2", f"CUDA 13 toolkit, or `pip install {WHEELS}`$"), ("12.8", "a CUDA 12 toolkit$")],
)
def test_none(machine, tmp_path, cuda, remedy):
    torch = torch_of(cuda, tmp_path)
    where = f"on PATH, in {tmp_path}/usual or in {place_of_wheels(torch)}"
    with pytest.raises(NoKernelsError, match=f"^there is no nvcc {where}: set CUDA_HOME.*{remedy}"):
        find_toolkit(torch)


def test_not_a_cuda_torch(machine, tmp_path):
    """Compiles nothing for it; but what kernels come to can be asked (benchmarks/kernels.py)."""
    usual = toolkit(tmp_path / "usual")
    assert _toolkit.toolkits(torch_of(None, tmp_path)) == [usual]
    with pytest.raises(NoKernelsError, match=r"^torch 2\.15\.0 is not a CUDA build$"):
        find_toolkit(torch_of(None, tmp_path))


def test_the_libraries_headers_are_found_with_torch(tmp_path: Path) -> None:
    """Where the toolkit lacks them, and after all others."""
    torch = SimpleNamespace(__file__=str(tmp_path / "site/torch/__init__.py"))
    cublas, other = (tmp_path / "site/nvidia" / name / "include" for name in ("cublas", "nccl"))
    for folder in (cublas, other, tmp_path / "home/include"):
        folder.mkdir(parents=True)
    (cublas / "cublas_v2.h").touch()
    home = tmp_path / "home"
    assert _toolkit.library_headers(home, torch) == ["-idirafter", str(cublas)]
    (home / "include/cublas_v2.h").touch()
    assert _toolkit.library_headers(home, torch) == ["-idirafter", str(cublas)]
    for name in ("cublasLt.h", "cusparse.h", "cusolverDn.h"):
        (home / "include" / name).touch()
    assert _toolkit.library_headers(home, torch) == []


def test_ninja_is_found_beside_python(monkeypatch, tmp_path):
    """pip puts it there: on PATH only where the environment is activated."""
    (tmp_path / "ninja").touch(mode=0o755)
    monkeypatch.setattr(_toolkit.sysconfig, "get_path", {"scripts": str(tmp_path)}.get)
    monkeypatch.setenv("PATH", "/nowhere")
    _toolkit.find_pips_ninja()
    assert shutil.which("ninja") == str(tmp_path / "ninja")
