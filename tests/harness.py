"""The benchmarks package, imported without putting the root of the source tree on sys.path.

The root holds ./lsoftmax, which must not hide the installed package (see "test" in the Makefile).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load_benchmarks() -> None:
    """Make `import benchmarks` find ROOT/benchmarks."""
    if "benchmarks" in sys.modules:
        return
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["benchmarks"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


load_benchmarks()
