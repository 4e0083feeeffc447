"""`python -m lsoftmax`: what is installed, built and visible, and what to do about each fault.

`python -m lsoftmax plot` draws what the loss does.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

import lsoftmax

from . import _extension
from ._toolkit import MIN_CAPABILITY, NoKernelsError, find_toolkit

NO_KERNEL_IMAGE = 'CUDA says "no kernel image is available"'


def rebuild() -> str:
    """What builds the kernels anew, in words."""
    command = _extension.install_command()
    needs = ", which needs setuptools and ninja" if command == _extension.UV else ""
    return f"LSOFTMAX_CUDA=1 {command}{needs} (in its source tree; else lsoftmax for the dot)"


def output_of(*command: str) -> str:
    """What a program prints; empty where it is not there or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def is_source_tree() -> bool:
    """Whether this file is not of an installed package."""
    return (Path(__file__).parents[1] / "setup.py").is_file()


def run_installed() -> None:
    """In a source tree, ends this program as that of the installed package which the tree hides:
    ``python -m`` looks into the current directory first. Returns where there is none.
    """
    if not is_source_tree():
        return
    installed = PathFinder.find_spec("lsoftmax", sys.path[1:])
    if installed is None or installed.origin is None:
        return
    if Path(installed.origin).parent.samefile(Path(__file__).parent):
        return
    # Not as __main__: what is found may be a source tree too, and would look for the next.
    code = "import sys; del sys.path[0]; from lsoftmax.__main__ import run; run()"
    raise SystemExit(subprocess.call([sys.executable, "-c", code, *sys.argv[1:]]))


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for `archs` ("8.0;9.0+PTX") run on a GPU of this compute capability.

    Machine code runs on later minors of its own major. PTX is compiled on the spot for any newer
    GPU. An arch with a letter ("9.0a") runs on that one alone.
    """
    for major, minor, letter, ptx in re.findall(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", archs):
        arch = (int(major), int(minor))
        same = arch == capability if letter else arch[0] == capability[0] and arch <= capability
        if same or (ptx and not letter and arch <= capability):
            return True
    return False


def registrations() -> list[str]:
    """The ops of this package, each with whether it has a CUDA implementation."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("lsoftmax::")]
    on_cuda = torch._C._dispatch_has_kernel_for_dispatch_key
    return [f"{n}: {'CUDA' if on_cuda(n, 'CUDA') else 'PyTorch only'}" for n in sorted(names)]


def advice(status: _extension.Status, driver: str, no_toolkit: str) -> list[str]:
    """What to do about each fault there is, the one to mend first coming first.

    ``no_toolkit`` is why there could be no kernels today, empty if there could.
    """
    cuda = torch.version.cuda
    todo = []
    if not cuda and driver:
        todo.append(
            "This torch is a CPU build on a machine with a GPU: install a CUDA build of torch."
        )
    if status.built and not status.loaded:
        return [*todo, status.reason]
    if not cuda:
        return todo
    if not status.built:
        if is_source_tree():
            todo.append(f"This is lsoftmax's source tree, {Path(__file__).parents[1]}.")
        todo.append(f"{status.reason} CUDA tensors run in plain PyTorch.")
        if no_toolkit and no_toolkit not in status.reason:
            todo.append(f"{no_toolkit[0].upper()}{no_toolkit[1:]}.")
        todo.append(
            f"Then {rebuild()}. Where compiling takes all memory, with MAX_JOBS=1 in front of it."
        )
    if not torch.cuda.is_available():
        why = "see nvidia-smi and CUDA_VISIBLE_DEVICES" if driver else "there is no NVIDIA driver"
        todo.append(f"torch sees no GPU ({why}).")
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if not status.loaded:
            continue
        if covers(status.archs, capability):
            if capability == (9, 0) and "9.0a" not in status.archs:
                todo.append(
                    f"The kernels, for {status.archs}, leave out Hopper's matrix instructions "
                    f"(bfloat16 is slower): TORCH_CUDA_ARCH_LIST=9.0a {rebuild()}."
                )
            continue
        arch = f"{capability[0]}.{capability[1]}"
        fault = f"GPU {i} is of compute capability {arch}, the kernels are for {status.archs}"
        if capability < MIN_CAPABILITY:
            todo.append(
                f"{fault}, never for less than 8.0 ({NO_KERNEL_IMAGE}). Use the CPU, or plain "
                f"PyTorch: LSOFTMAX_CUDA=0 {_extension.install_command()}"
            )
        else:
            arch += "a" if arch == "9.0" else ""  # with Hopper's matrix instructions
            todo.append(f"{fault} ({NO_KERNEL_IMAGE}): TORCH_CUDA_ARCH_LIST={arch} {rebuild()}.")
    return list(dict.fromkeys(todo))


def report() -> None:
    """Prints what is installed, built and visible, and what to do."""
    status = _extension.status()
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    nvcc, no_toolkit = "none that fits torch", ""
    try:
        home, release = find_toolkit(torch)
        nvcc = f"CUDA {release}, {home}/bin/nvcc"
    except NoKernelsError as error:
        no_toolkit = str(error)
    if status.built:
        kernels = "loaded" if status.loaded else "built, not loaded"
    else:
        kernels = "not built"
    lines = [
        ("lsoftmax", f"{lsoftmax.__version__} in {Path(__file__).parent}"),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or '-'}"),
        ("nvcc", nvcc),
        ("driver", driver.partition("\n")[0] or "not found"),
    ]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        lines.append((f"GPU {i}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}"))
    lines.append(("kernels", kernels))
    if status.torch_built:
        lines += [
            ("built for", f"torch {status.torch_built}, compute capability {status.archs}"),
            ("built by", f"nvcc {status.nvcc_built}, {status.cxx_built}"),
        ]
    lines += [("op", line) for line in registrations()]
    for name, value in lines:
        print(f"{name:<10} {value}")
    todo = advice(status, driver, no_toolkit)
    print("\nTo do:" if todo else "\nNothing to do.")
    for item in todo:
        print(f"  - {item}")


def plot(picture: str, output: Path) -> None:
    """Draws a picture; what is not there or not possible ends the program in words."""
    try:
        from . import plots

        if picture == "features":
            from . import digits
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise SystemExit(
            f"Pictures need {package}, which is not installed: pip install 'lsoftmax[plot]'"
        ) from None
    try:
        plots.format_of(output)  # before what takes a minute
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if picture == "features":
        torch.set_num_threads(1)  # so small a network gains nothing from two
        panels, labels = digits.learn_all()
        figure = plots.draw_features(panels, labels)
    else:
        draw = {"psi": plots.draw_psi, "loss": plots.draw_loss, "boundary": plots.draw_boundary}
        figure = draw[picture]()
    try:
        plots.save(figure, output)
    except OSError as error:
        raise SystemExit(f"{output} can't be written: {error}") from None
    print(output.resolve())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lsoftmax", description="Reports what is installed, built and visible."
    )
    parser.add_argument("--version", action="version", version=lsoftmax.__version__)
    commands = parser.add_subparsers(dest="command")
    pictures = commands.add_parser(
        "plot", help="draw what the loss does", description="Draws what the loss does."
    )
    pictures.add_argument(
        "picture",
        choices=("psi", "loss", "boundary", "features"),
        help="psi and its slope; the loss as a feature turns; decision regions of two classes; "
        "features of handwritten digits, learned on the spot",
    )
    pictures.add_argument("-o", "--output", type=Path, help="the picture (default: PICTURE.png)")
    args = parser.parse_args(arguments)
    if args.command is None:
        report()
        return
    output = args.output or Path(f"{args.picture}.png")
    if os.path.isdir(output):
        parser.error(f"{output}: expected a file to write, this is a directory")
    try:
        NamedTemporaryFile(dir=output.parent, prefix=output.name).close()
    except OSError as error:
        parser.error(f"{output} can't be written: {error}")
    plot(args.picture, output)


def run() -> None:
    """The program, whose output may end early."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`; what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    run_installed()
    run()
