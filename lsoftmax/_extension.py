"""Loads the compiled kernels (`lsoftmax._C`), or says in words why they are not there.

The extension fits one build of torch. Under another, importing it ends in a missing symbol or in a
crash: so the build leaves `_build_info.json` beside it, which is read and compared first.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# With `lsoftmax` for the dot it does for who has no source tree: pip keeps the wheel that it has
# once made of an index's sources, whatever torch it was for.
PIP = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary lsoftmax ."
# uv hides from a build the torch that it installs for, unless it is told not to.
UV = "uv pip install --no-build-isolation --no-deps --reinstall-package lsoftmax ."


@dataclass(frozen=True)
class Status:
    """What became of the compiled kernels.

    Attributes:
        built: The installation holds kernels.
        loaded: They are loaded, and CUDA tensors run on them.
        reason: Why they are not loaded, in a sentence or two; empty where they are.
        torch_built: Version of torch they were built for.
        nvcc_built: Version of the nvcc that compiled them.
        cxx_built: The host compiler, as it names itself.
        archs: Compute capabilities they were compiled for, as in TORCH_CUDA_ARCH_LIST.
    """

    built: bool
    loaded: bool
    reason: str
    torch_built: str = ""
    nvcc_built: str = ""
    cxx_built: str = ""
    archs: str = ""


_status = Status(built=False, loaded=False, reason="lsoftmax was not imported")
_warned = False


def read_build_info(directory: Path) -> dict[str, Any]:
    """What setup.py recorded beside the package; empty where there is no record."""
    try:
        info = json.loads((directory / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def install_command() -> str:
    """What builds and installs the package anew, by the program that installed it."""
    records = Path(__file__).parents[1].glob("lsoftmax-*.dist-info/INSTALLER")
    return UV if any(record.read_text().strip() == "uv" for record in records) else PIP


def _reinstall() -> str:
    return f"Reinstall lsoftmax under this torch: {install_command()}"


def _abi(version: str) -> str:
    """The part of a torch version that an extension depends on: releases keep it within a minor;
    others may change it from commit to commit, which is what their local part names.
    """
    public = version.partition("+")[0]
    return version if re.search("[a-z]", public) else ".".join(public.split(".")[:2])


def _shown(version: str) -> str:
    """A torch version as far as it counts: of a release without its local part."""
    return version if _abi(version) == version else version.partition("+")[0]


def why_unfit(info: dict[str, Any], torch_version: str, cuda: str | None) -> str:
    """Why an extension with this record must not be imported here; empty where it may be."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    built, built_cuda = str(info.get("torch", "")), info.get("cuda")
    if info.get("python", python) != python:
        built_for = f"The kernels were built for Python {info['python']}"
        return f"{built_for}, this is {python}. {_reinstall()}"
    if built and (_abi(built), built_cuda) != (_abi(torch_version), cuda):
        here = f"CUDA {cuda}" if cuda else "no CUDA"
        return (
            f"The kernels were built for torch {_shown(built)} (CUDA {built_cuda}), "
            f"this is torch {_shown(torch_version)} ({here}). {_reinstall()}"
        )
    return ""


def _is_stale(info: dict[str, Any], package: Path) -> bool:
    """Whether kernels built in place are older than the sources beside them, which an import would
    end the process for: the ops have other arguments.
    """
    header = package.parent / "csrc" / "engine.h"
    if "interface" not in info or not header.is_file():
        return False
    return hashlib.sha256(header.read_bytes()).hexdigest() != info["interface"]


def load() -> None:
    """Imports the kernels if they were built for this torch. Called once, by `import lsoftmax`.

    Warns (RuntimeWarning) where kernels were built but cannot be used; raises nothing.
    """
    global _status
    package = Path(__file__).parent
    info = read_build_info(package)
    built = "torch" in info or importlib.util.find_spec(f"{__package__}._C") is not None
    if not built:
        reason = "The CUDA kernels were not built when lsoftmax was installed"
        reason += f": {info['missing']}." if "missing" in info else "."
    else:
        reason = why_unfit(info, str(torch.__version__), torch.version.cuda)
        if not reason and _is_stale(info, package):
            reason = (
                "The kernels were built from other sources than lie here. Build them again: "
                "pip install --no-build-isolation --no-deps -e ."
            )
    if built and not reason:
        try:
            importlib.import_module(f"{__package__}._C")
        except (ImportError, OSError) as error:
            reason = f"The kernels were built but do not load ({error}). {_reinstall()}"
    _status = Status(
        built=built,
        loaded=built and not reason,
        reason=reason,
        torch_built=str(info.get("torch", "")),
        nvcc_built=str(info.get("nvcc", "")),
        cxx_built=str(info.get("cxx", "")),
        archs=str(info.get("archs", "")),
    )
    if built and reason:
        warnings.warn(f"lsoftmax: {reason}", RuntimeWarning, stacklevel=2)


def status() -> Status:
    """What `load` found."""
    return _status


def cuda_available() -> bool:
    """Whether the CUDA kernels were built and loaded. (Not: whether there is a GPU to run them.)"""
    return _status.loaded


def warn_once_no_kernels() -> None:
    """Says, the first time only, that CUDA tensors run without the kernels, and why."""
    global _warned
    if _warned or _status.loaded:
        return
    _warned = True
    warnings.warn(
        "lsoftmax runs CUDA tensors in plain PyTorch, slower and with more memory. "
        f"{_status.reason} `python -m lsoftmax` says what to do.",
        RuntimeWarning,
        stacklevel=3,
    )
