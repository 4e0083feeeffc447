"""Rules of the build that no compiler checks: what nvcc is shown, and what a build may require."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.MULTILINE)


def included(file: Path, seen: set[str]) -> set[str]:
    """Everything a file of ours includes, by way of our other files too."""
    for quote, name in INCLUDE.findall(file.read_text()):
        if name not in seen:
            seen.add(name)
            if quote == '"':
                included(CSRC / name, seen)
    return seen


@pytest.mark.parametrize("kernel", sorted(CSRC.glob("*.cu")), ids=lambda path: path.name)
def test_nvcc_sees_nothing_of_torch_but_light_headers(kernel: Path) -> None:
    """torch/extension.h takes it a minute and a half a file; of torch's newest, C++20."""
    names = included(kernel, set())
    assert "lsoftmax.h" in names or "hopper.h" in names, "the includes were not found"
    of_torch = {n for n in names if n.startswith(("torch/", "ATen/", "c10/", "pybind11"))}
    assert of_torch <= {"c10/macros/Macros.h", "c10/util/BFloat16.h", "c10/util/Half.h"}


def test_the_host_code_needs_no_cusparse() -> None:
    """ATen's own CUDA headers need libraries that a small toolkit lacks: one file does without."""
    files = [f for f in CSRC.iterdir() if f.suffix in (".cpp", ".h") and f.name != "tf32.cpp"]
    names = set().union(*(included(file, set()) for file in files))
    assert "c10/cuda/CUDAStream.h" in names
    assert not [name for name in names if name.startswith("ATen/cuda/")]
    assert "torch/extension.h" not in names


def test_a_build_fetches_no_torch_and_an_installation_needs_a_recent_one() -> None:
    """An isolated build would otherwise compile for another torch than the one in use."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = (\[.*\])$", text, re.MULTILINE)
    assert requires
    assert "setuptools" in requires[1]
    assert "ninja" in requires[1]
    assert "torch" not in requires[1]
    assert 'requires-python = ">=3.10"' in text
    assert '"torch>=2.9"' in text


def test_setup_can_load_the_search_for_a_toolkit_before_there_is_a_torch() -> None:
    text = (ROOT / "lsoftmax" / "_toolkit.py").read_text()
    imported = re.findall(r"^\s*(?:from|import) (\S+)", text, re.MULTILINE)
    assert len(imported) > 5
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
