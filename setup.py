"""Builds lsoftmax, with the CUDA kernels (`lsoftmax._C`) where they can be built.

LSOFTMAX_CUDA         unset: kernels if torch is a CUDA build and nvcc is found, else pure Python
                      1: kernels, or an error that names what is missing; 0: pure Python
CUDA_HOME             the CUDA toolkit (default: the first that fits torch, of nvcc on PATH,
                      /usr/local/cuda, and pip's wheels next to torch)
TORCH_CUDA_ARCH_LIST  as for any torch extension (default: the GPUs here, or else DEFAULT_ARCHS)
CC, CXX               a C++ compiler that nvcc supports (default: gcc, g++)
MAX_JOBS              files compiled at once
LSOFTMAX_WERROR       1: warnings in our own code are errors
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import sys
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = {(8, 0), (9, 0), (10, 0), (12, 0)}
HOPPER = (9, 0)
DATACENTRE = (10, 0)  # whose PTX 11.0 runs, which is older than that of 12.0


def load(path: Path) -> ModuleType:
    """A module of the package that is being built: importing that itself would need torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkit = load(ROOT / "lsoftmax" / "_toolkit.py")
NoKernelsError, ask = toolkit.NoKernelsError, toolkit.ask


def say(line: str) -> None:
    """Prints a line that is seen: pip keeps a build's output to itself, a terminal does not."""
    print(line, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{line}\n")


def import_torch() -> Any:
    """The torch of the environment that pip was called from.

    An isolated build takes site-packages off sys.path, but runs the same Python: site still names
    it. It goes to the end of sys.path, so that the build's own setuptools stays first.
    """
    if importlib.util.find_spec("torch") is None:
        for directory in [*site.getsitepackages(), site.getusersitepackages()]:
            site.addsitedir(directory)
    try:
        import torch
    except (ImportError, OSError) as error:
        raise NoKernelsError(
            f"the build cannot import torch ({error}): install torch first; if it is installed, "
            "add --no-build-isolation"
        ) from None
    return torch


def libraries(home: Path, names: list[str]) -> list[str]:
    """What to link with: a toolkit of wheels has CUDA's runtime by its versioned name alone."""
    versioned = sorted(home.glob("lib/libcudart.so.*"))
    if not versioned or (home / "lib/libcudart.so").exists():
        return names
    return [f":{versioned[0].name}" if name == "cudart" else name for name in names]


def choose_archs(list_gpu_arch: str, gpus: set[tuple[int, int]]) -> str:
    """A TORCH_CUDA_ARCH_LIST for these GPUs; for all we support where there are none.

    (There torch raises IndexError.) The newest also gets PTX, which GPUs yet to come can run. For
    Hopper it is 9.0a, with the matrix instructions that no other GPU has, and that no PTX carries.
    """
    known = {(int(a), int(b)) for a, b in re.findall(r"compute_(\d+)(\d)\b", list_gpu_arch)}
    usable = {arch for arch in known if arch >= toolkit.MIN_CAPABILITY}
    archs = DEFAULT_ARCHS & usable
    if gpus:
        fits = [{arch for arch in usable if arch <= gpu} for gpu in gpus]
        archs = {max(fit) for fit in fits if fit}
    if not archs:
        raise NoKernelsError("the kernels need compute capability 8.0, from nvcc and from the GPU")
    specific = {HOPPER} & archs if not gpus or HOPPER in gpus else set()
    portable = archs - specific
    names = {arch: f"{arch[0]}.{arch[1]}" for arch in sorted(archs)}
    names |= {arch: f"{names[arch]}a" for arch in specific}
    with_ptx = {max(portable, default=HOPPER)} | (set() if gpus else {DATACENTRE})
    for arch in with_ptx & portable:
        names[arch] += "+PTX"
    return ";".join(names.values())


def with_hopper(archs: str) -> str:
    """The list with 9.0a for 9.0: the same GPUs, with the matrix instructions that they have. One
    with PTX stays as it is, for that of 9.0a runs nowhere else.
    """
    return re.sub(r"(?<![\d.])9\.0(?![\da-z+])|Hopper(?![\w+])", "9.0a", archs)


def as_built(cpp_extension: Any) -> str:
    """TORCH_CUDA_ARCH_LIST as torch understands it, in which "Hopper" is a number."""
    asked = os.environ["TORCH_CUDA_ARCH_LIST"]
    try:
        flags = " ".join(cpp_extension._get_cuda_arch_flags())
    except (ValueError, IndexError) as error:
        raise SystemExit(
            "lsoftmax: TORCH_CUDA_ARCH_LIST: expected compute capabilities such as '8.0;9.0a', "
            f"got {asked!r}: {error}"
        ) from None
    ptx = set(re.findall(r"code=compute_(\d+[a-z]?)", flags))
    archs = set(re.findall(r"arch=compute_((\d+)(\d)([a-z]?))", flags))
    return ";".join(  # torch sorts by text: 10.0 before 8.0
        f"{major}.{minor}{letter}" + ("+PTX" if arch in ptx else "")
        for arch, major, minor, letter in sorted(archs, key=lambda a: (int(a[1]), a))
    )


def compile_flags(torch_includes: list[str]) -> dict[str, list[str]]:
    # Torch adds -std= and the architectures. It leaves the architectures out where a flag for nvcc
    # has "arch" in it, be it in a path. No fast-math: the loss needs exact logarithms.
    flags = {"cxx": ["-O3", "-g0", "-fvisibility=hidden"], "nvcc": ["-O3", "-lineinfo"]}
    if os.environ.get("LSOFTMAX_WERROR") == "1":
        flags["cxx"] += ["-Wall", "-Wextra", "-Werror"]
        flags["cxx"] += [word for path in torch_includes for word in ("-isystem", path)]
        flags["nvcc"] += ["-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra"]
    return flags


def write_build_info(directory: Path, **facts: Any) -> None:
    """For the loader, which reads it before it imports `_C`: what was built, or why nothing was."""
    facts["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    (directory / "_build_info.json").write_text(json.dumps(facts, indent=2) + "\n")


def with_kernels() -> dict[str, Any]:
    """Arguments for setup() that build the kernels. Raises NoKernelsError where that cannot be."""
    torch = import_torch()
    home, release = toolkit.find_toolkit(torch)
    nvcc = str(home / "bin/nvcc")
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "") in ("", "native"):
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        os.environ["TORCH_CUDA_ARCH_LIST"] = choose_archs(ask(nvcc, "--list-gpu-arch"), gpus)
    os.environ["TORCH_CUDA_ARCH_LIST"] = with_hopper(os.environ["TORCH_CUDA_ARCH_LIST"])
    os.environ["CUDA_HOME"] = str(home)  # torch reads it when cpp_extension is imported
    from torch.utils import cpp_extension

    facts = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": release,
        "archs": as_built(cpp_extension),
        "cxx": ask(
            *shlex.split(cpp_extension.get_cxx_compiler()),
            "--version",
            remedy=": install a C++ compiler or set CXX",
        ).split("\n")[0],
        # Of the ops: kernels built in place may come to lie beside newer sources.
        "interface": hashlib.sha256((ROOT / "csrc/engine.h").read_bytes()).hexdigest(),
    }
    toolkit.find_pips_ninja()
    if not cpp_extension.is_ninja_available():
        say("lsoftmax: there is no ninja, so one file is compiled at a time: pip install ninja")

    class BuildKernels(cpp_extension.BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            try:
                super().run()
            except Exception:
                say(
                    "lsoftmax: compiling failed, the first error above says why. Where memory ran "
                    "out: MAX_JOBS=1. Where nvcc does not support the C++ compiler: one that it "
                    "does, as CC=gcc-14 CXX=g++-14. To do without kernels: LSOFTMAX_CUDA=0"
                )
                raise
            write_build_info(Path(self.get_ext_fullpath("lsoftmax._C")).parent, **facts)

    extension = cpp_extension.CUDAExtension(
        "lsoftmax._C",
        sorted(glob("csrc/*.cpp", root_dir=ROOT) + glob("csrc/*.cu", root_dir=ROOT)),
        extra_compile_args=compile_flags(cpp_extension.include_paths()),
    )
    headers = toolkit.headers(home)
    if headers and headers.parent != home:  # conda's, where nvcc looks, but torch does not
        extension.include_dirs.append(str(headers))
        extension.library_dirs.append(str(headers.parent / "lib"))
    extension.extra_compile_args["cxx"] += toolkit.library_headers(home, torch)
    extension.libraries = libraries(home, extension.libraries)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildKernels}}


def plan() -> dict[str, Any]:
    """Arguments for setup(): what LSOFTMAX_CUDA asks for, out of what there is."""
    asked = os.environ.get("LSOFTMAX_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"lsoftmax: LSOFTMAX_CUDA must be unset, 0 or 1, not {asked!r}")
    arguments: dict[str, Any] = {"cmdclass": {}}
    missing = "LSOFTMAX_CUDA=0 asked for it" if asked == "0" else ""
    try:
        if not missing:
            arguments = with_kernels()
    except NoKernelsError as error:
        missing = str(error)
        if asked == "1":
            raise SystemExit(f"lsoftmax: LSOFTMAX_CUDA=1 wants the kernels: {missing}") from None

    class BuildPackage(build_py):
        def run(self) -> None:
            package = ROOT / "lsoftmax"
            if not self.editable_mode:
                # build/ remembers earlier builds: neither their kernels nor their files may ship.
                package = Path(self.build_lib).resolve() / "lsoftmax"
                shutil.rmtree(package, ignore_errors=True)
            super().run()
            if missing:
                for stale in package.glob("_C.*"):
                    stale.unlink()
                say(f"lsoftmax: installing WITHOUT the CUDA kernels: {missing}")
                write_build_info(package, missing=missing)

    arguments["cmdclass"]["build_py"] = BuildPackage
    return arguments


if __name__ == "__main__":
    # pip runs this file three times; the runs that only ask for metadata need no torch.
    describing = {"egg_info", "dist_info", "sdist"} & set(sys.argv)
    setup(**({} if describing else plan()))
