"""Pictures of an experiment's rows, written whole or not at all."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extras import needed
from files import write

with needed():
    import numpy as np
    from matplotlib.figure import Figure

    from lsoftmax.plots import COLOURS

Row = dict[str, Any]


def colour(margin: int) -> str:
    """One for each margin, the same in all pictures."""
    return COLOURS.get(margin, f"C{4 + margin % 6}")


def short(margin: int) -> str:
    """What a margin is called where there is little room."""
    return "softmax" if margin == 1 else f"m = {margin}"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write(path, buffer.getvalue())


def _margins(rows: Sequence[Row]) -> dict[int, list[Row]]:
    return {m: [row for row in rows if row["margin"] == m] for m in {r["margin"]: 0 for r in rows}}


def draw_angles(path: Path, rows: Sequence[Row]) -> None:
    """Distribution of the test images' angles to their own and to the nearest other class."""
    margins = _margins(rows)
    figure = Figure(figsize=(2.9 * len(margins), 2.7), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(margins), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (margin, of_margin) in zip(panels, margins.items(), strict=True):
        for which, words in (("own", "own class"), ("other", "nearest other")):
            counts = np.sum([row["angle_counts"][which] for row in of_margin], axis=0)
            edges = np.linspace(0, 180, len(counts) + 1)
            style = {"color": colour(margin), "fill": True, "alpha": 0.75}
            if which == "other":  # an outline, which hides nothing
                style = {"color": "0.2", "lw": 1.2}
            axes.stairs(100 * counts / counts.sum(), edges, label=words, **style)
        axes.set(title=short(margin), xlim=(0, 120), xticks=[0, 30, 60, 90, 120])
        axes.legend(frameon=False, fontsize=8)
    figure.supxlabel("angle to the class vector, degrees", fontsize=10)
    panels[0].set_ylabel("% of the test images")
    save(figure, path)


def draw_training(path: Path, rows: Sequence[Row]) -> None:
    """Loss, angle, satisfied share and lam over the epochs, the mean over a margin's runs."""
    shown = {
        "loss": "training loss",
        "angle": "angle to the own class, degrees",
        "satisfied": "margin satisfied, share",
        "lam": "lam",
    }
    figure = Figure(figsize=(11.6, 2.9), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(shown))
    for axes, (key, words) in zip(panels, shown.items(), strict=True):
        for margin, of_margin in _margins(rows).items():
            if key == "lam" and margin == 1:
                continue
            curves = zip(*(row["history"][key] for row in of_margin), strict=True)
            means = [_mean(values) for values in curves]
            epochs = range(1, len(means) + 1)
            axes.plot(epochs, means, color=colour(margin), label=short(margin))
        axes.set(title=words, xlabel="epoch")
        axes.title.set_fontsize(10)
        if key in ("loss", "lam"):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.02 if key == "satisfied" else None)
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else float("nan")


def draw_roc(path: Path, rows: Sequence[Row], rates: Sequence[float], negatives: int) -> None:
    """Share of same pairs accepted over the share of different ones, the mean over the runs. Each
    was tested with ``negatives`` different pairs: a smaller share than one of them is none.
    """
    far = np.array(rates)
    resolved = far * negatives >= 1
    figure = Figure(figsize=(4.6, 4.0), dpi=130, layout="constrained")
    axes = figure.subplots()
    for margin, of_margin in _margins(rows).items():
        curves = np.array([row["roc"] for row in of_margin])
        tar = curves.mean(0)[resolved]
        axes.plot(100 * far[resolved], tar, color=colour(margin), label=short(margin))
    axes.set(
        xscale="log",
        xlabel="different pairs accepted (FAR), %",
        ylabel="same pairs accepted (TAR), %",
        ylim=(0, 100),
    )
    axes.grid(color="0.92")
    axes.legend(frameon=False)
    save(figure, path)
