"""The plots of the trainability study, from its results."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure

from study_results import COMPARED, LOSSES, WORSE, Results, columns, deviation, failures, select
from study_tasks import ANNEALINGS, Cell


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
    kinds = list(dict.fromkeys(map(kind, ANNEALINGS)))
    lines = -(-len(COMPARED) // 3)
    figure = Figure(figsize=(11, 3.2 * lines + 0.8), dpi=120, layout="constrained")
    for axes, task in zip(figure.subplots(lines, 3).flat, COMPARED, strict=False):
        baseline = select(results, Cell(task, 1, "softmax", 0.1, 0))
        limit = statistics.mean(run["error"] for run in baseline) + WORSE if baseline else 100
        for name in ANNEALINGS:
            runs = select(results, Cell(task, 1 if name == "softmax" else 4, name, 0.1, 0))
            error, angle = ([run[key] for run in runs] for key in ("error", "angle"))
            if not runs or statistics.mean(error) > limit:
                continue
            axes.errorbar(
                *(statistics.mean(angle), statistics.mean(error)),
                xerr=deviation(angle),
                yerr=deviation(error),
                fmt="*" if name == "softmax" else "^" if name.startswith("by_angle") else "o",
                ms=11 if name == "softmax" else 6,
                color="black" if name == "softmax" else f"C{kinds.index(kind(name))}",
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


def kind(name: str) -> str:
    """What annealings with one colour have in common: both defaults, and both with another keep."""
    return name.replace("by_angle", "for_steps")


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
