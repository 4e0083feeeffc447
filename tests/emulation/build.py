"""Build the kernels for the CPU, against the CUDA headers beside this file, and load the result.

``load()`` registers the CUDA implementation of every op for CPU tensors: from then on, in that
process, the whole path of a GPU runs without one. ``load(sanitize=True)`` is the same under
AddressSanitizer and UBSan, in a process started with :func:`sanitizer_environment`.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
EMULATOR = [
    HERE / "emulation.cpp",
    HERE / "synchronisation.cpp",
    HERE / "shared_memory.cpp",
    HERE / "fiber.cpp",
    HERE / "hopper_copies.cpp",
    HERE / "hopper_products.cpp",
]
HOPPER = ["gemm_exponentials", "exponential_rows"]  # kernels that hopper_launch.cpp calls
SELFTEST = [HERE / "selftest_right.cpp", HERE / "selftest_faults.cpp"]

FLAGS = [
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # #pragma unroll
    "-fno-strict-aliasing",  # kernels move 16-byte packs of smaller types
    "-fno-gnu-unique",  # or two libraries with an emulator each would share its variables
    "-DLSOFTMAX_DISPATCH_KEY=CPU",
]
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
]


def compiler() -> str | None:
    """The C++ compiler that torch would use, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def load(sanitize: bool = False) -> ModuleType:
    """Build what has changed, import it, and so register the ops of ``lsoftmax`` for the CPU."""
    module: ModuleType = _build("lsoftmax_emulation", sanitize)
    return module


@functools.cache
def load_selftest(sanitize: bool = False) -> ctypes.CDLL:
    """The emulator with its own kernels: ``selftest_run(case)`` returns the fault's text."""
    library = ctypes.CDLL(_build("emulation_selftest", sanitize))
    library.selftest_run.argtypes = [ctypes.c_char_p]
    library.selftest_run.restype = ctypes.c_char_p
    return library


@functools.cache
def load_hopper(sanitize: bool = False) -> ctypes.CDLL:
    """The launchers of csrc/hopper.h as ``hopper_*(params)``; each returns the fault's text.

    ``hopper_selftest_run(case)`` is to the emulation of Hopper what ``selftest_run`` is to all.
    """
    library = ctypes.CDLL(_build("emulation_hopper", sanitize))
    for name in ("row_reference", "gemm_exponentials", "exponential_rows"):
        getattr(library, f"hopper_{name}").argtypes = [ctypes.c_void_p]
        getattr(library, f"hopper_{name}").restype = ctypes.c_char_p
    library.hopper_selftest_run.argtypes = [ctypes.c_char_p]
    library.hopper_selftest_run.restype = ctypes.c_char_p
    return library


def counters(library: ctypes.CDLL | ModuleType) -> dict[str, int]:
    """What ``library`` has run since loaded: launches, blocks, barriers, warp operations, and the
    bytes that packs (csrc/block.cuh) have read and written.
    """
    names = "launches", "blocks", "barriers", "warp_operations", "bytes_read", "bytes_written"
    values = (ctypes.c_uint64 * len(names))()
    _as_cdll(library).emulation_counters(values)
    return dict(zip(names, values, strict=True))


@contextmanager
def reversed_order(library: ctypes.CDLL | ModuleType) -> Iterator[None]:
    """Within, blocks, warps and lanes take their turns last to first.

    Races on shared memory are found in any order. Global memory is not watched: there, a result
    that depends on the order of turns is how a race shows.
    """
    _as_cdll(library).emulation_set_reversed(1)
    try:
        yield
    finally:
        _as_cdll(library).emulation_set_reversed(0)


@contextmanager
def stubbed(library: ModuleType) -> Iterator[None]:
    """Within, kernels and matrix products are called but not run: what is left is the host's work.

    Products into a given array, that is (``at::mm_out``, ``at::addmm_out``): the engine's.
    """
    switches = _as_cdll(library)
    try:
        switches.emulation_set_stubbed(1)
        switches.engine_set_products_stubbed(1)
        yield
    finally:
        switches.engine_set_products_stubbed(0)
        switches.emulation_set_stubbed(0)


def sanitizer_runtimes() -> list[str]:
    """The compiler's libraries that a sanitized build needs loaded first; empty if it lacks any.

    Python is not linked with the sanitizers, and they must come first; nor is it linked with
    libstdc++, whose __cxa_throw AddressSanitizer looks up as it starts.
    """
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [compiler() or "g++", f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    return paths if all(map(os.path.isabs, paths)) else []


def sanitizer_environment() -> dict[str, str]:
    """What a process needs in its environment, beyond this one's, to load a sanitized build."""
    return {
        "LD_PRELOAD": " ".join(sanitizer_runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has until it ends
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def _sources(name: str, directory: Path) -> list[Path]:
    """What is built: host code as it is, each .cu file by way of a .cpp file that includes it."""
    if name == "emulation_selftest":
        return SELFTEST
    if name == "emulation_hopper":
        sources = [HERE / "hopper_launch.cpp", HERE / "selftest_hopper.cpp"]
        kernels = [CSRC / f"{kernel}.cu" for kernel in HOPPER]
    else:
        sources = [HERE / "engine_launch.cpp", *sorted(CSRC.glob("*.cpp"))]
        kernels = sorted(CSRC.glob("*.cu"))
    for kernel in kernels:
        wrapper = directory / f"{kernel.stem}_cu.cpp"
        text = f'#include <cuda_runtime.h>\n#include "{kernel}"\n'
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
        sources.append(wrapper)
    return sources


def _build(name: str, sanitize: bool) -> Any:
    # Imports setuptools and more, which a test that merely looks at this file can do without.
    from torch.utils import cpp_extension

    from lsoftmax._toolkit import find_pips_ninja

    find_pips_ninja()
    version = torch.__version__ + ("-sanitize" if sanitize else "")
    directory = ROOT / "build" / "emulation" / version / name
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        sources = _sources(name, directory)
        return cpp_extension.load(
            name=name,
            sources=[str(source) for source in EMULATOR + sources],
            extra_cflags=FLAGS + (SANITIZE if sanitize else []),
            extra_ldflags=SANITIZE if sanitize else [],
            extra_include_paths=[str(HERE / "include"), str(HERE), str(CSRC)],
            build_directory=str(directory),
            is_python_module=name == "lsoftmax_emulation",
        )


def _as_cdll(library: ctypes.CDLL | ModuleType) -> ctypes.CDLL:
    return ctypes.CDLL(library.__file__) if isinstance(library, ModuleType) else library


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time. torch's own lock outlives a process killed under it, for ever."""
    with open(directory / "process.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)
        yield
