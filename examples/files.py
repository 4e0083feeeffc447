"""Files that are there whole or not at all, whenever the program that writes them is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    _replace(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """The same of JSON; NaN, which JSON has not, is an error rather than a file few can read."""
    write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def save(path: Path, state: dict[str, Any]) -> None:
    """The same of tensors and plain values, for ``torch.load(path, weights_only=True)``."""
    _replace(path, lambda temporary: torch.save(state, temporary))


def _replace(path: Path, fill: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fill(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
