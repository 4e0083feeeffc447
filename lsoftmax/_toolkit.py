"""The CUDA toolkit that kernels are built with: for setup.py, and for `python -m lsoftmax`.

setup.py loads this file by its path, before there is a package, so it imports nothing of ours and
no torch.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

MIN_CAPABILITY = (8, 0)  # of the GPUs that kernels are built for
MIN_RELEASE = (12, 4)  # of the toolkit; older ones were not tried
USUAL = Path("/usr/local/cuda")
WHEELS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl")


class NoKernelsError(Exception):
    """Why the kernels cannot be built, as half a sentence for whoever is installing."""


def ask(*command: str, remedy: str = "") -> str:
    """What a compiler says about itself."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoKernelsError(f"{command[0]} does not run ({error}){remedy}") from None


def find_pips_ninja() -> None:
    """pip's lies beside the Python of an environment, which need not be activated."""
    if shutil.which("ninja") is None:
        scripts = sysconfig.get_path("scripts")
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])


def requirements(cuda: str) -> list[str]:
    """What to ask of pip for nvcc of a CUDA release ("13.0"); there is none before 13.

    All of one release, which the wheels' own requirements do not see to.
    """
    return [f"{name}~={cuda}.0" for name in WHEELS]


def place_of_wheels(torch: Any) -> Path:
    """Where pip puts CUDA 13, part by part: some parts always come with torch, nvcc does not."""
    return Path(torch.__file__).parents[1] / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}"


def named_home() -> str | None:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def headers(home: Path) -> Path | None:
    """The folder of a toolkit's headers: conda's has one for each kind of machine, and no other."""
    machine = platform.machine()
    kinds = ["sbsa-linux", "aarch64-linux"] if machine == "aarch64" else [f"{machine}-linux"]
    folders = [home / "include", *(home / "targets" / kind / "include" for kind in kinds)]
    return next((folder for folder in folders if (folder / "cuda_runtime.h").is_file()), None)


def toolkits(torch: Any) -> list[Path]:
    """CUDA toolkits: the one that was named, at its word, or those there are, in this order."""
    if named := named_home():
        homes = [Path(named)]
    else:
        found = shutil.which("nvcc")
        on_path = [Path(found).resolve().parents[1]] if found else []
        # An nvcc without headers near it is a wrapper script, whose toolkit lies elsewhere.
        homes = [home for home in [*on_path, USUAL] if headers(home)]
        if torch.version.cuda:
            homes.append(place_of_wheels(torch))
    return [home for home in homes if (home / "bin/nvcc").is_file()]


def check_wheels(home: Path) -> None:
    """NoKernelsError if pip's wheels do not compile.

    pip takes wheels of several releases together, whose compiler the assembler does not know.
    """
    cc = os.environ.get("CC")
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "empty.cu")
        source.write_text("#include <cuda_fp16.h>\n")
        command = [str(home / "bin/nvcc"), "-cubin", "-arch=sm_80", str(source)]
        command += ["-o", f"{source}.cubin"]
        command += ["-ccbin", cc] if cc else []  # torch's way to name it
        compiled = subprocess.run(command, capture_output=True, text=True)
    said = compiled.stderr.strip()
    # A C++ compiler that is too new for nvcc is no fault of theirs: said when the kernels compile.
    if compiled.returncode and "#error -- unsupported" not in said:
        raise NoKernelsError(
            f"the CUDA wheels in {home} are not all there, or of several releases "
            f"({said.splitlines()[0] if said else f'exit code {compiled.returncode}'})"
        )


def check(home: Path, torch: Any) -> str:
    """The CUDA release of a toolkit ("13.0"). NoKernelsError if it cannot build for torch."""
    nvcc = str(home / "bin/nvcc")
    match = re.search(r"release (\d+)\.(\d+)", ask(nvcc, "--version"))
    release = f"{match[1]}.{match[2]}" if match else "unknown"
    cuda = torch.version.cuda
    if release.split(".")[0] != cuda.split(".")[0]:
        raise NoKernelsError(
            f"nvcc in {home} is of CUDA {release}, torch {torch.__version__} is of CUDA {cuda}"
        )
    if match and (int(match[1]), int(match[2])) < MIN_RELEASE:
        least = ".".join(map(str, MIN_RELEASE))
        raise NoKernelsError(f"nvcc in {home} is of CUDA {release}, at least {least} is needed")
    if home == place_of_wheels(torch):
        check_wheels(home)
    return release


def find_toolkit(torch: Any) -> tuple[Path, str]:
    """The CUDA toolkit to build with, the first that fits this torch, and its release ("13.0").

    Raises:
        NoKernelsError: there is none, with what to do.
    """
    cuda = torch.version.cuda
    if cuda is None:
        raise NoKernelsError(f"torch {torch.__version__} is not a CUDA build")
    faults = []
    for home in toolkits(torch):
        try:
            return home, check(home, torch)
        except NoKernelsError as error:  # noqa: PERF203
            faults.append(str(error))
    named = named_home()
    major = cuda.split(".")[0]
    remedy = f"set CUDA_HOME to a CUDA {major} toolkit"
    if int(major) >= 13:
        unset = "unset CUDA_HOME and " if named else ""
        remedy += f", or {unset}`pip install {' '.join(requirements(cuda))}`"
    wheels = place_of_wheels(torch)
    where = f"in CUDA_HOME={named}" if named else f"on PATH, in {USUAL} or in {wheels}"
    faults.append(f"there is no nvcc {where}")
    raise NoKernelsError(f"{faults[0]}: {remedy}")


def library_headers(home: Path, torch: Any) -> list[str]:
    """Flags that find cuBLAS' headers (csrc/tf32.cpp) with torch, where the toolkit lacks them.
    After all others, so that nothing else changes.
    """
    wanted = ("cublas_v2.h", "cublasLt.h", "cusparse.h", "cusolverDn.h")
    folder = headers(home) or home / "include"
    if all((folder / name).exists() for name in wanted):
        return []
    folders = sorted((Path(torch.__file__).parents[1] / "nvidia").glob("*/include"))
    found = [folder for folder in folders if any((folder / name).exists() for name in wanted)]
    return [word for folder in found for word in ("-idirafter", str(folder))]
