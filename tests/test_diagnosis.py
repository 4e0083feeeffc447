"""`python -m lsoftmax` where one thing is wrong: does it say what it is, and what to do about it?

The package is copied, with a record of a build, and extensions, that are made up; what a machine
with a GPU would say is put into torch. Each report is written by a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import lsoftmax
from fresh import FreshPythons

PACKAGE = Path(lsoftmax.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
TORCH = str(torch.__version__).partition("+")[0]
BUILT = {
    "torch": TORCH, "cuda": "13.0", "nvcc": "13.0", "archs": "8.0;9.0a", "cxx": "g++ 12"
}  # fmt: skip
REPORT = """
import json, os, torch
from types import SimpleNamespace as Made

facts = json.loads(os.environ["FACTS"])
torch.version.cuda = facts["cuda"]
gpus = [tuple(gpu) for gpu in facts["gpus"]]
torch.cuda.is_available = lambda: bool(gpus)
torch.cuda.device_count = lambda: len(gpus)
torch.cuda.get_device_capability = lambda i: gpus[i]
torch.cuda.get_device_properties = lambda i: Made(name="GPU", major=gpus[i][0], minor=gpus[i][1])
from lsoftmax.__main__ import main  # not as a program, which looks for an installed package

main([])
"""


@dataclass
class Machine:
    """One with nothing wrong: kernels built for its torch, and a GPU they are for."""

    record: dict[str, Any] | None = field(default_factory=lambda: dict(BUILT))
    extension: bytes | str | None = "# loads"  # text: Python; bytes: a shared library
    cuda: str | None = "13.0"  # torch's
    gpus: list[tuple[int, int]] = field(default_factory=lambda: [(9, 0)])
    nvcc: str | None = "13.0"
    driver: bool = True
    as_source_tree: bool = False
    newer_sources: bool = False
    installer: str = "pip"


@dataclass
class Case:
    name: str
    machine: Machine
    says: list[str]
    warns: bool = False


INSTALL = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary lsoftmax ."
REBUILD = f"LSOFTMAX_CUDA=1 {INSTALL}"
REINSTALL = f"Reinstall lsoftmax under this torch: {INSTALL}"
UV = "uv pip install --no-build-isolation --no-deps --reinstall-package lsoftmax ."
CASES = [
    Case("nothing", Machine(), ["kernels    loaded", "Nothing to do."]),
    Case(
        "no CUDA at all",
        Machine({"missing": "torch is no CUDA build"}, None, None, [], None, False),
        ["kernels    not built", "Nothing to do."],
    ),
    Case(
        "no nvcc",
        Machine({"missing": "there is no nvcc on PATH"}, None, nvcc=None),
        [
            "nvcc       none that fits torch",
            "there is no nvcc on PATH",  # as it was recorded
            "There is no nvcc in CUDA_HOME=",
            "or unset CUDA_HOME and `pip install nvidia-cuda-nvcc~=13.0.0 nvidia-nvvm~=13.0.0",
            REBUILD,
        ],
    ),
    Case(
        "no C++ compiler",
        Machine({"missing": "c++ does not run: install a C++ compiler or set CXX"}, None),
        ["install a C++ compiler or set CXX", REBUILD],
    ),
    Case(
        "CUDA majors differ",
        Machine({"missing": "nvcc is of CUDA 12.8"}, None, nvcc="12.8"),
        ["is of CUDA 12.8, torch", "is of CUDA 13.0: set CUDA_HOME to a CUDA 13 toolkit", REBUILD],
    ),
    Case(
        "uv hid torch from the build",
        Machine({"missing": "the build cannot import torch"}, None, installer="uv"),
        [
            "were not built when lsoftmax was installed: the build cannot import torch.",
            f"LSOFTMAX_CUDA=1 {UV}, which needs setuptools and ninja (in its source tree",
        ],
    ),
    Case(
        "built for another torch, by uv",
        Machine({**BUILT, "torch": "2.3.1"}, installer="uv"),
        [f"Reinstall lsoftmax under this torch: {UV}"],
        warns=True,
    ),
    Case(
        "compiling took all memory",
        Machine(None, None),
        ["were not built when lsoftmax was installed", REBUILD, "with MAX_JOBS=1"],
    ),
    Case(
        "built for another torch",
        Machine({**BUILT, "torch": "2.3.1"}),
        [f"built for torch 2.3.1 (CUDA 13.0), this is torch {TORCH}", REINSTALL],
        warns=True,
    ),
    Case(
        "built for another CUDA",
        Machine({**BUILT, "cuda": "12.6"}),
        [f"built for torch {TORCH} (CUDA 12.6), this is torch {TORCH} (CUDA 13.0)", REINSTALL],
        warns=True,
    ),
    Case(
        "torch became a CPU build",
        Machine(cuda=None),
        [f"this is torch {TORCH} (no CUDA)", REINSTALL, "install a CUDA build of torch"],
        warns=True,
    ),
    Case(
        "CPU build of torch beside a GPU",
        Machine({"missing": "torch is no CUDA build"}, None, None),
        ["CPU build on a machine with a GPU: install a CUDA build of torch"],
    ),
    Case(
        "built for another Python",
        Machine({**BUILT, "python": "3.1"}),
        ["built for Python 3.1, this is 3.", REINSTALL],
        warns=True,
    ),
    Case(
        "the extension is gone",
        Machine(extension=None),
        ["built, not loaded", "do not load (No module named", REINSTALL],
        warns=True,
    ),
    Case(
        "the extension is no library",
        Machine(extension=b"\x7fELF and then nothing"),
        ["built, not loaded", "do not load (", REINSTALL],
        warns=True,
    ),
    Case(
        "the extension misses a symbol",
        Machine(extension="raise ImportError('undefined symbol: _ZN3c10')"),
        ["do not load (undefined symbol: _ZN3c10)", REINSTALL],
        warns=True,
    ),
    Case(
        "built in place, before the sources changed",
        Machine({**BUILT, "interface": "0"}, newer_sources=True),
        ["built from other sources", "pip install --no-build-isolation --no-deps -e ."],
        warns=True,
    ),
    Case(
        "no kernel image for the GPU",
        Machine(gpus=[(8, 6), (12, 0)]),
        [
            "GPU 1 is of compute capability 12.0, the kernels are for 8.0;9.0a",
            "no kernel image is available",
            f"TORCH_CUDA_ARCH_LIST=12.0 {REBUILD}",
        ],
    ),
    Case(
        "no kernel image for Hopper",
        Machine({**BUILT, "archs": "8.0"}, gpus=[(9, 0)]),
        [f"TORCH_CUDA_ARCH_LIST=9.0a {REBUILD}"],
    ),
    Case(
        "kernels for Hopper without its instructions",
        Machine({**BUILT, "archs": "8.0;9.0+PTX"}, gpus=[(9, 0)]),
        ["for 8.0;9.0+PTX, leave out Hopper's", f"TORCH_CUDA_ARCH_LIST=9.0a {REBUILD}"],
    ),
    Case(
        "a GPU that is too old",
        Machine(gpus=[(7, 5)]),
        ["compute capability 7.5", "never for less than 8.0", "LSOFTMAX_CUDA=0 pip install"],
    ),
    Case(
        "no GPU is visible",
        Machine(gpus=[]),
        ["torch sees no GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES)"],
    ),
    Case(
        "no driver",
        Machine(gpus=[], driver=False),
        ["torch sees no GPU (there is no NVIDIA driver)"],
    ),
    Case(
        "nothing is installed, this is the source tree",
        Machine(None, None, as_source_tree=True),
        ["This is lsoftmax's source tree", REBUILD],
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def pythons() -> Iterator[FreshPythons]:
    with FreshPythons() as server:
        yield server


def install(machine: Machine, root: Path) -> dict[str, str]:
    """The package as it is on that machine, in root / "a site"; and its environment."""
    site = root / "a site"
    left = shutil.ignore_patterns("__pycache__", "_C*", "_build_info.json")
    package = Path(shutil.copytree(PACKAGE, site / "lsoftmax", ignore=left))
    if machine.record is not None:
        (package / "_build_info.json").write_text(json.dumps(machine.record))
    if isinstance(machine.extension, bytes):
        (package / f"_C{SUFFIX}").write_bytes(machine.extension)
    elif machine.extension is not None:
        (package / "_C.py").write_text(machine.extension)
    if machine.as_source_tree:
        (site / "setup.py").touch()
    if machine.newer_sources:
        (site / "csrc").mkdir()
        (site / "csrc" / "engine.h").touch()
    records = site / f"lsoftmax-{lsoftmax.__version__}.dist-info"
    records.mkdir()
    (records / "INSTALLER").write_text(f"{machine.installer}\n")
    tools = root / "tools" / "bin"
    tools.mkdir(parents=True)
    if machine.nvcc:
        program(tools / "nvcc", f"Cuda compilation tools, release {machine.nvcc}, V{machine.nvcc}")
    if machine.driver:
        program(tools / "nvidia-smi", "580.65.06")
    facts = json.dumps({"cuda": machine.cuda, "gpus": machine.gpus})
    return {"PATH": f"{tools}:/usr/bin:/bin", "CUDA_HOME": str(root / "tools"), "FACTS": facts}


def program(path: Path, words: str) -> None:
    path.write_text(f"#!/bin/sh\necho '{words}'\n")
    path.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_says_what_it_is_and_what_to_do(case: Case, pythons: FreshPythons, tmp_path: Path) -> None:
    environment = install(case.machine, tmp_path)
    status, output = pythons.run(tmp_path / "a site", REPORT, **environment)
    assert status == 0, output
    for sentence in case.says:
        assert sentence in output
    if "Nothing to do." not in case.says:
        assert "To do:\n  - " in output
    assert output.count("RuntimeWarning: lsoftmax: ") == (1 if case.warns else 0), output


def test_a_source_tree_hides_no_installed_package(tmp_path: Path) -> None:
    """Red if `pip install .` and `python -m lsoftmax` in the same folder speak of the folder."""
    here, other = (source_tree(tmp_path / name) for name in ("here", "other"))

    def run(argument: str, path: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lsoftmax", argument],
            cwd=here,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )

    installed = str(PACKAGE.parent)
    version = run("--version", installed)
    assert (version.returncode, version.stdout.strip()) == (0, lsoftmax.__version__), version.stderr
    assert run("picture", installed).returncode == 2, "the exit status is the installed program's"
    # Red if the one that is found, a source tree as well, begins to look for another, and so on.
    assert run("--version", str(other)).stdout.strip() == "of other"


def source_tree(folder: Path) -> Path:
    """A copy of the package as it lies in a source tree, with a version of its own."""
    package = Path(shutil.copytree(PACKAGE, folder / "lsoftmax"))
    (folder / "setup.py").touch()
    with (package / "__init__.py").open("a") as module:
        module.write(f'\n__version__ = "of {folder.name}"\n')
    return folder


def test_a_closed_pipe_is_no_error() -> None:
    """As of ``python -m lsoftmax | head -1``."""
    pipe = subprocess.PIPE
    report = subprocess.Popen([sys.executable, "-m", "lsoftmax"], stdout=pipe, stderr=pipe)
    report.stdout.close()  # long before torch is imported
    assert report.communicate()[1] == b""
    assert report.returncode == 1
