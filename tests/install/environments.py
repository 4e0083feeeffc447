"""Virtual environments and source trees that the package is built in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, fails: bool = False, **env: str) -> str:
    """What a command prints, without the variables that setup.py reads and pip keeps quiet by."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for name in ("LSOFTMAX_CUDA", "LSOFTMAX_WERROR", "TORCH_CUDA_ARCH_LIST", "PIP_QUIET"):
        clean.pop(name, None)
    words = [str(word) for word in command]
    result = subprocess.run(
        words, env=clean | env, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


class Environment:
    """An empty virtual environment that also sees what is installed with `base`."""

    def __init__(self, path: Path, base: Path | None):
        run(sys.executable, "-m", "venv", "--without-pip", path)
        self.python = path / "bin" / "python"
        self.site = Path(self.purelib(self.python))
        self.package = self.site / "lsoftmax"
        # Without a base there is pip alone, for which this Python's will do.
        self.pip = [self.python, "-m", "pip"] if base else [sys.executable, "-m", "pip"]
        self.pip += [] if base else ["--python", self.python]
        self.path = os.environ["PATH"]
        if base:
            (self.site / "base.pth").write_text(f"{self.purelib(base)}\n")
            self.path = f"{base.parent}:{self.path}"

    @staticmethod
    def purelib(python: Path) -> str:
        return run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()

    def install(self, *args: object, fails: bool = False, **env: str) -> str:
        command = [*self.pip, "install", "-v", "--no-deps", *args]
        return run(*command, fails=fails, PATH=self.path, **env)

    def report(self) -> str:
        """`python -m lsoftmax`, in which every warning of ours is an error."""
        return run(self.python, "-W", "error::RuntimeWarning", "-m", "lsoftmax")


def make_base(directory: Path, torch: str, variable: str) -> Path:
    if variable in os.environ:
        return Path(os.environ[variable])
    run(sys.executable, "-m", "venv", directory)
    python = directory / "bin" / "python"
    run(python, "-m", "pip", "install", torch, "numpy", "setuptools>=77", "ninja")
    return python


def copy_source(directory: Path) -> Path:
    """A clean source tree, in a folder with a space in its name as some homes have."""
    caches = (".*_cache", ".hypothesis", "__pycache__")
    left = (
        ".git",
        ".venv*",
        "build",
        "_build",
        "dist",
        "*.egg-info",
        "*.so",
        "_build_info.json",
        *caches,
    )
    target = directory / "the source"
    return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*left)))
