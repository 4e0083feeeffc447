"""What a run was measured on and with."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import lsoftmax

from . import ROOT
from .providers import PROVIDERS

# What changes the figures without being seen in them.
VARIABLES = (
    "LSOFTMAX_FUSED_FORWARD",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
)


def describe(device: torch.device) -> dict:
    """The device, the versions, and the commit of the tree this harness lies in."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return {
        "gpu": gpu,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "lsoftmax": lsoftmax.__version__,
        "kernels": lsoftmax.cuda_available(),
        "packages": _packages(),
        "commit": _command("git", "rev-parse", "HEAD"),
        "dirty": _dirty(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def same_machine(a: dict, b: dict) -> list[str]:
    """The facts in which two descriptions differ and figures of one run must not."""
    facts = ["gpu", "cpu", "threads", "torch", "cuda", "float32_matmul_precision", "lsoftmax"]
    facts += ["kernels", "packages", "commit", "dirty", "environment"]
    return [fact for fact in facts if a.get(fact) != b.get(fact)]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _packages() -> dict[str, str]:
    """The versions of the optional packages that are installed."""
    versions = {}
    for package in sorted({p.package for p in PROVIDERS if p.requires and p.package}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _dirty() -> bool | None:
    """Whether the tree differs from its commit, results apart; None outside a repository."""
    changes = _command("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return None if changes is None else bool(changes)


def _command(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
