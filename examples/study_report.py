"""The trainability study in docs/training.md: its tables, and where its plots go."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import files
import pages
from figures import save
from study_plots import plot_failures, plot_figures, plot_norms
from study_results import (
    COMPARED,
    LOSSES,
    Results,
    cells_of,
    columns,
    deviation,
    failures,
    select,
)
from study_tasks import ANNEALINGS, CLIPS, TASKS, UNEQUAL, Cell

DOCS = Path(__file__).parents[1] / "docs"


def write(runs: dict[str, dict[str, Any]]) -> None:
    """The tables of docs/training.md, and its plots."""
    page, results = DOCS / "training.md", cells_of(runs)
    files.write(page, fill(page.read_text(), results).encode())
    for name, figure in (
        ("failures", plot_failures(results)),
        ("figures", plot_figures(results)),
        ("norms", plot_norms(results)),
    ):
        save(figure, DOCS / f"training-{name}.png")


def fill(page: str, results: Results) -> str:
    """The page with its tables made anew.

    Raises:
        SystemExit: the page has no place for one.
    """
    tables = {
        "runs": runs_table,
        "failures": failures_table,
        "never": never_table,
        "figures": figures_table,
        "defaults": defaults_table,
        "clipped": clipped_table,
        "unequal": unequal_tables,
    }
    for name, made in tables.items():
        page = pages.fill(page, name, made(results))
    return page


def spread(runs: Iterable[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs]
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f} ± {deviation(values):.1f}"


def setting(cell: Cell) -> str:
    """What trainings of a task differ in, besides their loss."""
    return f"{cell.optimizer} {cell.lr:g} {cell.activation} {cell.dtype}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def runs_table(results: Results) -> str:
    """How many trainings there are, and of what."""
    rows = []
    for name, task in TASKS.items():
        cells = [cell for cell in results if cell.task == name]
        settings = {setting(cell) for cell in cells}
        seeds = len({cell.seed for cell in cells})
        diverged = sum(results[cell]["diverged"] is not None for cell in cells)
        numbers = (task.epochs, len(settings), seeds, len(cells), diverged)
        rows.append([name, *map(str, numbers), "; ".join(sorted(settings))])
    head = ["task", "epochs", "settings", "seeds", "trainings", "not finite", "which settings"]
    return table(head, rows)


def failures_table(results: Results) -> str:
    failed = failures(results)
    rows = [
        [name, *(share(failed[task, margin, name]) for task, margin in columns(results))]
        for name in LOSSES
    ]
    return table(["failed / run", *(f"{task}, m = {m}" for task, m in columns(results))], rows)


def never_table(results: Results) -> str:
    """Classes that no test image is taken for, on the task that has many: means of the seeds."""
    across = [(task, m) for task in ("omniglot", "omniglot-long") for m in (2, 4)]
    rows = []
    for name in ANNEALINGS:
        row = [name]
        for task, margin in across:
            like = Cell(task, 1 if name == "softmax" else margin, name, 0.1, 0)
            counts = [run["never_predicted"] for run in select(results, like)]
            row.append(f"{statistics.mean(counts):.1f}" if counts else "-")
        rows.append(row)
    return table(["of 200 classes", *(f"{task}, m = {m}" for task, m in across)], rows)


def share(lost: Sequence[bool]) -> str:
    return f"{sum(lost)} / {len(lost)}" if lost else "-"


def figures_table(results: Results) -> str:
    """Error and angle of m = 4 at learning rate 0.1, ReLU, float32."""
    rows = []
    for name in ANNEALINGS:
        cells = [Cell(task, 1 if name == "softmax" else 4, name, 0.1, 0) for task in COMPARED]
        found = [select(results, cell) for cell in cells]
        rows.append([name, *(spread(runs, key) for runs in found for key in ("error", "angle"))])
    return table(["m = 4", *(f"{task}, {key}" for task in COMPARED for key in ("%", "°"))], rows)


def defaults_table(results: Results) -> str:
    """Error and angle of softmax and of both default schedules, m = 4, in every setting."""
    rows = []
    for like in settings_of(results, COMPARED):
        losses = ((1, "softmax"), (4, "for_steps"), (4, "by_angle"))
        found = [select(results, replace(like, margin=m, annealing=name)) for m, name in losses]
        softmax, *ours = ([run["angle"] for run in runs] for runs in found)
        narrower = [
            f"{statistics.mean(softmax) / statistics.mean(angle):.1f}" if angle else "-"
            for angle in ours
        ]
        figures = [f"{spread(runs, 'error')}; {spread(runs, 'angle')}" for runs in found]
        rows.append([like.task, setting(like), *figures, " / ".join(narrower)])
    head = ["task", "setting", "softmax: %; °", "for_steps", "by_angle", "times narrower"]
    return table(head, rows)


def settings_of(results: Results, tasks: Sequence[str]) -> list[Cell]:
    """A cell of softmax for each setting that these tasks were trained in."""
    found = {replace(c, seed=0) for c in results if c.annealing == "softmax" and c.task in tasks}
    return sorted(found, key=lambda cell: (tasks.index(cell.task), cell.group))


def clipped_table(results: Results) -> str:
    """Errors without and with clipped gradients, in every setting where all were trained."""
    losses = [(m, name) for m in (2, 4) for name in ("for_steps", "by_angle")]
    rows = []
    for like in settings_of(results, ["digits-plain", *COMPARED]):
        row = [like.task, setting(like)]
        for margin, annealing in ((1, "softmax"), *losses):
            cell = replace(like, margin=margin, annealing=annealing)
            clipped = [replace(cell, task=f"{like.task}-clip{clip}") for clip in CLIPS]
            found = [select(results, each) for each in (cell, *clipped)]
            row.append(" / ".join(map(errors, found)) if all(found) else "-")
        if row[2] != "-":
            rows.append(row)
    names = (f"m = {margin}, {name}" for margin, name in losses)
    return table(["task", "setting", "softmax", *names], rows)


def errors(runs: Sequence[dict[str, Any]]) -> str:
    """Their mean and deviation; or how many have none."""
    lost = sum(run["diverged"] is not None for run in runs)
    return f"not finite, {lost} of {len(runs)}" if lost else spread(runs, "error")


def unequal_tables(results: Results) -> str:
    """Errors where half of the classes have few images, and how many of the ten are never answered;
    one table for each way to train.
    """
    across = [(activation, m) for activation in ("relu", "prelu") for m in (2, 4)]
    titles = {"relu": "ReLU", "prelu": "PReLU"}
    heads = [f"{titles[activation]}, m = {m}" for activation, m in across]

    def entry(task: str, name: str, activation: str, margin: int) -> str:
        like = Cell(task, 1 if name == "softmax" else margin, name, 0.1, 0, activation)
        runs = select(results, like)
        lost = statistics.mean(run["never_predicted"] for run in runs) if runs else 0
        return spread(runs, "error") + (f" ({lost:.1f})" if lost else "")

    tables = []
    ways = ("as they are", "class weights", "in the last fifth", "balanced batches")
    for task, words in zip(UNEQUAL, ways, strict=True):
        rows = [[name, *(entry(task, name, *column) for column in across)] for name in ANNEALINGS]
        tables.append(table([f"{words}: error, %", *heads], rows))
    return "\n".join(tables)
