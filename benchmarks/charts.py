"""The charts of a run, and which of its rows each shows."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from . import drawing
from .cases import CPU_SHAPES, GPU_SHAPES
from .drawing import Cases
from .tables import by_case


@dataclass(frozen=True)
class Chart:
    """A picture of one run; `data` is empty where the run has not what it shows."""

    name: str
    title: str
    data: Callable[[dict], Any]
    figure: Callable[[dict, Any], Figure]

    def draw(self, result: dict) -> bytes:
        """The picture as PNG."""
        figure = self.figure(result, self.data(result))
        figure.suptitle(self.title, x=0.008, ha="left", fontsize=13, weight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, facecolor="white")
        return buffer.getvalue()


def available(result: dict) -> list[Chart]:
    """The charts that this run has the rows for."""
    return [chart for chart in CHARTS if chart.data(result)]


def shown(result: dict) -> Cases:
    """Cases of the run's first type and margin: what one picture can hold."""
    cases = list(by_case(result))
    kinds = [(case.dtype, case.margin) for case, _ in cases]
    return [item for item, kind in zip(cases, kinds, strict=True) if kind == kinds[0]]


def standard(result: dict) -> Cases:
    """The standard shapes among them; of a run that has none, all."""
    cases = shown(result)
    return [item for item in cases if item[0].shape in CPU_SHAPES + GPU_SHAPES] or cases


def series(result: dict, axis: str) -> Cases:
    """The longest series of cases that differ in `axis` ("n" or "c") alone, if it has three."""
    groups: dict[tuple, Cases] = {}
    for case, rows in shown(result):
        fixed = tuple(value for name, value in case.as_dict().items() if name != axis)
        groups.setdefault(fixed, []).append((case, rows))
    best = max(groups.values(), key=len, default=[])
    return sorted(best, key=lambda item: getattr(item[0], axis)) if len(best) >= 3 else []


def both_series(result: dict) -> dict[str, Cases]:
    found = {axis: series(result, axis) for axis in ("c", "n")}
    return {axis: cases for axis, cases in found.items() if cases}


def with_backward(result: dict) -> Cases:
    passes = result["settings"]["passes"]
    return standard(result) if "forward_backward" in passes else []


CHARTS = [
    Chart("times", "Time against everything else", standard, drawing.times),
    Chart("roofline", "How far from the machine's limits", with_backward, drawing.roofline),
    Chart("memory", "Memory against C", lambda r: series(r, "c"), drawing.memory),
    Chart("cost", "Time against the size", both_series, drawing.cost),
]
