"""What the results of the trainability study hold: which trainings, and which of them failed."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from study_tasks import ANNEALINGS, TASKS, Cell

KEY = re.compile(" ".join(f"{name}=(.*)" for name in Cell.__dataclass_fields__))
LOSSES = [name for name in ANNEALINGS if name != "softmax"]
# What clipped gradients change, and networks without normalisation: a table of their own, and no
# part in the others.
COMPARED = [name for name, task in TASKS.items() if task.clip is None and name != "digits-plain"]
WORSE = 5.0  # points of error above softmax's that count as a failure: half a lost digit

Results = dict[Cell, dict[str, Any]]


def cells_of(runs: dict[str, dict[str, Any]]) -> Results:
    """Figures by cell, of figures by the cell's key."""
    return {cell_of(key): figures for key, figures in runs.items()}


def cell_of(key: str) -> Cell:
    """The cell that has this key."""
    match = KEY.fullmatch(key)
    if match is None:
        raise SystemExit(f"results: expected a cell's name, got {key!r}")
    task, margin, annealing, lr, seed, *rest = match.groups()
    return Cell(task, int(margin), annealing, float(lr), int(seed), *rest)


def softmax_error(results: Results) -> dict[tuple[str, ...], float]:
    """Mean error of softmax by what cells trained side by side have in common."""
    errors = defaultdict(list)
    for cell, run in results.items():
        if cell.margin == 1:
            errors[cell.group].append(run["error"])
    return {group: statistics.mean(values) for group, values in errors.items()}


def failures(results: Results) -> dict[tuple[str, int, str], list[bool]]:
    """Which runs failed, by task, margin and annealing."""
    baseline, failed = softmax_error(results), defaultdict(list)
    for cell, run in results.items():
        if cell.margin > 1 and cell.group in baseline:
            lost = run["diverged"] is not None or run["error"] > baseline[cell.group] + WORSE
            failed[cell.task, cell.margin, cell.annealing].append(lost)
    return failed


def select(results: Results, like: Cell) -> list[dict[str, Any]]:
    """All seeds of a cell."""
    return [run for cell, run in results.items() if replace(cell, seed=like.seed) == like]


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def columns(results: Results) -> list[tuple[str, int]]:
    """Tasks and margins that were tried."""
    tried = {(cell.task, cell.margin) for cell in results if cell.margin > 1}
    compared = [column for column in tried if column[0] in COMPARED]
    return sorted(compared, key=lambda column: (COMPARED.index(column[0]), column[1]))
