"""Planted faults: does the test command notice them? `make test-mutations` plants each and looks.

A fault is one replacement in one file, and the tests that are to turn red. Where an edit of the
code has changed the text of a fault, test_mutations.py says so: plant it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """One fault.

    Attributes:
        name: what is wrong, unique.
        file: from the root of the source tree.
        text: what is there, exactly once.
        instead: what takes its place.
        tests: node ids, separated by spaces; of those, the first that fails has caught it.
        backend: of the tests, as in conftest.py.
    """

    name: str
    file: str
    text: str
    instead: str
    tests: str
    backend: str = "portable"


class StaleFaultError(Exception):
    """The text that a fault replaces is not there exactly once."""


def planted(fault: Fault, root: Path = ROOT) -> str:
    """The file's text with the fault in it.

    Raises:
        StaleFaultError: the text is not there, or more than once.
    """
    text = (root / fault.file).read_text()
    found = text.count(fault.text)
    if found != 1:
        raise StaleFaultError(
            f"the fault {fault.name!r} no longer fits {fault.file}: its text is there {found} "
            f"times, expected once. Plant it anew in tests/mutations:\n{fault.text}"
        )
    return text.replace(fault.text, fault.instead)


def all_faults() -> list[Fault]:
    """Every fault, those of one file next to each other: its object is then built once a fault."""
    from . import annealing, classes, engine, kernels, layers, portable, shards

    modules = (kernels, engine, portable, shards, annealing, classes, layers)
    faults = [fault for module in modules for fault in module.FAULTS]
    return sorted(faults, key=lambda fault: (fault.backend, fault.file))
