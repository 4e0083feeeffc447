"""Tables and plots of the trainability study, from its results into docs/training.md."""

from __future__ import annotations

import io
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import files
import pages
from study_tasks import ANNEALINGS, CLIPS, TASKS, Cell

DOCS = Path(__file__).parents[1] / "docs"
KEY = re.compile(" ".join(f"{name}=(.*)" for name in Cell.__dataclass_fields__))
LOSSES = [name for name in ANNEALINGS if name != "softmax"]
# What clipped gradients change, and networks without normalisation: a table of their own, and no
# part in the others.
COMPARED = [name for name, task in TASKS.items() if task.clip is None and name != "digits-plain"]
WORSE = 5.0  # points of error above softmax's that count as a failure: half a lost digit

Results = dict[Cell, dict[str, Any]]


def write(runs: dict[str, dict[str, Any]]) -> None:
    """The tables of docs/training.md, and its plots."""
    page, results = DOCS / "training.md", cells_of(runs)
    files.write(page, fill(page.read_text(), results).encode())
    for name, figure in (
        ("failures", plot_failures(results)),
        ("figures", plot_figures(results)),
        ("norms", plot_norms(results)),
    ):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        files.write(DOCS / f"training-{name}.png", buffer.getvalue())


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
    }
    for name, made in tables.items():
        page = pages.fill(page, name, made(results))
    return page


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


def spread(runs: Iterable[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs]
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f} ± {deviation(values):.1f}"


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def setting(cell: Cell) -> str:
    """What trainings of a task differ in, besides their loss."""
    return f"{cell.optimizer} {cell.lr:g} {cell.activation} {cell.dtype}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def columns(results: Results) -> list[tuple[str, int]]:
    """Tasks and margins that were tried."""
    tried = {(cell.task, cell.margin) for cell in results if cell.margin > 1}
    compared = [column for column in tried if column[0] in COMPARED]
    return sorted(compared, key=lambda column: (COMPARED.index(column[0]), column[1]))


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


def plot_failures(results: Results) -> Figure:
    """Share of failed runs, annealing by task and margin."""
    failed, across = failures(results), columns(results)
    figure = Figure(figsize=(1.6 + 0.85 * len(across), 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(LOSSES):
        for column, (task, margin) in enumerate(across):
            lost = failed[task, margin, name]
            if lost:
                part = sum(lost) / len(lost)
                colour = (1, 1 - 0.75 * part, 1 - 0.8 * part) if part else (0.86, 0.95, 0.86)
                axes.fill_between([column, column + 1], row, row + 1, color=colour, lw=0)
                text = f"{100 * part:.0f}%"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9)
    axes.set(xlim=(0, len(across)), ylim=(len(LOSSES), 0), title="Failed trainings")
    axes.set_xticks([i + 0.5 for i in range(len(across))])
    axes.set_xticklabels([f"{task}\nm = {margin}" for task, margin in across], fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(len(LOSSES))])
    axes.set_yticklabels(LOSSES)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def plot_figures(results: Results) -> Figure:
    """Error against angle: mean of the seeds, m = 4, learning rate 0.1, ReLU."""
    lines = -(-len(COMPARED) // 3)
    figure = Figure(figsize=(11, 3.2 * lines + 0.8), dpi=120, layout="constrained")
    for axes, task in zip(figure.subplots(lines, 3).flat, COMPARED, strict=False):
        baseline = select(results, Cell(task, 1, "softmax", 0.1, 0))
        limit = statistics.mean(run["error"] for run in baseline) + WORSE if baseline else 100
        for index, name in enumerate(ANNEALINGS):
            runs = select(results, Cell(task, 1 if name == "softmax" else 4, name, 0.1, 0))
            error, angle = ([run[key] for run in runs] for key in ("error", "angle"))
            if not runs or statistics.mean(error) > limit:
                continue
            axes.errorbar(
                *(statistics.mean(angle), statistics.mean(error)),
                xerr=deviation(angle),
                yerr=deviation(error),
                fmt="*" if name == "softmax" else "o",
                ms=11 if name == "softmax" else 6,
                color="black" if name == "softmax" else f"C{index}",
                label=name,
            )
        axes.set(title=task, xlabel="angle to the own class, degrees", xlim=(0, None))
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in ANNEALINGS if name in handles]
    shown = [handles[name] for name in names]
    figure.legend(shown, names, loc="outside lower center", ncols=6, fontsize=8)
    figure.supylabel("test error, % (failed ones left out)", fontsize=10)
    return figure


def plot_norms(results: Results) -> Figure:
    """Norms and angle along one training, m = 4: a task with few classes and one with many."""
    tasks, names = (
        ("digits", "omniglot"),
        ("none", "constant 5", "for_steps, keep=None", "for_steps"),
    )
    titles = {2: "lam", 3: "mean angle, degrees", 4: "mean |x|", 5: "smallest |w|"}
    figure = Figure(figsize=(12, 5.6), dpi=120, layout="constrained")
    for row, (task, line) in enumerate(zip(tasks, figure.subplots(2, 4), strict=True)):
        for axes, (column, title) in zip(line, titles.items(), strict=True):
            for colour, name in enumerate(names):
                trace = results.get(Cell(task, 4, name, 0.1, 0), {}).get("trace", [])
                steps, values = ([point[i] for point in trace] for i in (0, column))
                axes.plot(steps, values, color=f"C{colour}", label=name)
            if column == 2:
                axes.set_yscale("symlog", linthresh=0.1)
                axes.set_ylabel(f"{task}, m = 4")
            axes.set(title=title if row == 0 else "", xlabel="step" if row else "")
            if column != 2:
                axes.set_ylim(0, None)
    figure.axes[1].legend(fontsize=7)
    return figure
