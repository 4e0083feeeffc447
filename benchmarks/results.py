"""A run's file: one JSON, rewritten whole after every case, so that a run can stop and go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .cases import Case

RESULTS = Path(__file__).parent / "results"
SCHEMA = Path(__file__).parent / "schema.json"  # says what is in such a file


def write(path: Path, result: dict) -> None:
    """Write the file whole or not at all."""
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def committed() -> list[Path]:
    """The files that the report is made of: a device's, then what else was measured on it; CPUs
    last.
    """
    return sorted(RESULTS.glob("*.json"), key=lambda path: (path.stem[:3] == "cpu", path.stem))


def cases(result: dict) -> list[Case]:
    """The cases that the run is to measure, in order."""
    return [Case(**case) for case in result["settings"]["cases"]]


def rows_of(result: dict, case: Case) -> list[dict]:
    return [row for row in result["rows"] if row["case"] == case.as_dict()]


def lost(result: dict, case: Case) -> dict[str, str]:
    """Providers after which the device did no more work in this case, and what they said."""
    found = [entry for entry in result.get("lost", []) if entry["case"] == case.as_dict()]
    return {entry["provider"]: entry["note"] for entry in found}


def add_lost(result: dict, case: Case, provider: str, note: str) -> None:
    """Remember one, so that the run can go on without it."""
    entry = {"case": case.as_dict(), "provider": provider, "note": note}
    result.setdefault("lost", []).append(entry)


def drop_incomplete(result: dict) -> None:
    """Forget cases of which a row is missing: their providers were to be timed interleaved."""
    wanted = set(result["settings"]["providers"])
    whole = [c for c in cases(result) if {r["provider"] for r in rows_of(result, c)} == wanted]
    result["rows"] = [row for row in result["rows"] if Case(**row["case"]) in whole]
