"""What the compiler makes of each kernel: registers, shared memory, stack and spills, by device.

    python -m benchmarks.kernels                 every csrc/*.cu for every supported device
    python -m benchmarks.kernels loss_rows.cu --arch 90a

Needs nvcc (the first that setup.py looks at) and torch's headers, no GPU. A warning is an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lsoftmax._toolkit import toolkits

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHS = ("80", "90a", "100", "120")

# ptxas -v: a line that names the kernel, then of it or of functions it calls, then its totals.
_KERNEL = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_TOTALS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_SERIALIZED = re.compile(r"\(C75\d\d\)")  # "info" of wgmma and setmaxnreg done the slow way


@dataclass
class Kernel:
    """One kernel on one device; bytes a thread, shared memory a block (what is static of it)."""

    file: str
    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0


def parse(file: str, text: str) -> list[Kernel]:
    """The kernels in what ``nvcc -Xptxas -v`` says."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if match := _KERNEL.search(line):
            kernels.append(Kernel(file, match[1], match[2]))
        elif kernels and (match := _SPILLS.search(line)):
            last = kernels[-1]
            stack, stores, loads = map(int, match.groups())
            last.stack = max(last.stack, stack)
            last.spill_stores += stores
            last.spill_loads += loads
        elif kernels and (match := _TOTALS.search(line)):
            kernels[-1].registers = int(match[1])
            shared = _SHARED.search(line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def compile_kernels(nvcc: str, source: Path, arch: str) -> list[Kernel]:
    """Compile one file for one device.

    Raises:
        RuntimeError: it does not compile; or ptxas has waited after each product of the tensor
            cores, or ignored a change of the register count, which to nvcc are no warnings.
    """
    from torch.utils.cpp_extension import include_paths

    command = [nvcc, "-std=c++20", "-O3", "-c", str(source), "-o", os.devnull]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra"]
    command += [word for path in include_paths() for word in ("-isystem", path)]
    run = subprocess.run(command, capture_output=True, text=True)
    words = run.stdout + run.stderr
    if run.returncode != 0 or _SERIALIZED.search(words):
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{words}")
    return parse(source.name, words)


def demangled(names: list[str]) -> list[str]:
    """As they are written, without namespaces and parameters; as they are, without c++filt."""
    if not shutil.which("c++filt"):
        return names
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    out = []
    for name in run.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|lsoftmax::|c10::", "", name)
        out.append(re.sub(r"\(.*\)$", "", name).removeprefix("void "))
    return out


def table(kernels: list[Kernel]) -> str:
    """A line a kernel, a column a device: registers, and where there are any, spilled bytes."""
    archs = sorted({kernel.arch for kernel in kernels}, key=lambda arch: int(arch.rstrip("a")))
    names = dict(zip([k.name for k in kernels], demangled([k.name for k in kernels]), strict=True))
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.file, names[kernel.name]), {})[kernel.arch] = kernel
    lines = ["| file | kernel | shared | " + " | ".join(f"sm_{arch}" for arch in archs) + " |"]
    lines.append("|---" * (len(archs) + 3) + "|")
    for (file, name), by_arch in sorted(rows.items()):
        shared = max(kernel.shared for kernel in by_arch.values())
        cells = [_cell(by_arch.get(arch)) for arch in archs]
        lines.append(f"| {file} | `{name}` | {shared} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(kernel: Kernel | None) -> str:
    if kernel is None:
        return "-"
    spills = kernel.spill_stores + kernel.spill_loads
    return f"{kernel.registers}" + (f", spills {spills}" if spills else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="names in csrc/ (default: all *.cu)")
    parser.add_argument("--arch", nargs="+", default=ARCHS, help="devices, as in sm_<arch>")
    options = parser.parse_args()
    sources = [CSRC / file for file in options.files] or sorted(CSRC.glob("*.cu"))
    homes = toolkits(torch)
    if not homes:
        raise SystemExit("there is no nvcc: put it on PATH or set CUDA_HOME")
    nvcc = str(homes[0] / "bin/nvcc")
    jobs = [(source, arch) for source in sources for arch in options.arch]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(compile_kernels, nvcc, *job) for job in jobs]
        try:
            found = [future.result() for future in tqdm(futures, file=sys.stderr, leave=False)]
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            raise SystemExit(str(error)) from None
    print("Registers a thread, and bytes spilled where any are; static shared memory in bytes.\n")
    print(table([kernel for kernels in found for kernel in kernels]))


if __name__ == "__main__":
    main()
