"""How a chart of results looks: every function takes cases with their rows and gives a figure."""

from __future__ import annotations

import math
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import offset_copy

from .cases import Case
from .floors import least
from .providers import OURS, PRODUCTS, PROVIDERS
from .tables import PLAIN, counts, figures, is_ours, longest, ranked

Cases = list[tuple[Case, dict[str, dict]]]  # each with its rows by provider

# Told apart by the colour-blind too. Ours stands out; what is no loss is grey.
OUR_COLOUR, LIMIT_COLOUR, TEXT = "#D55E00", "0.5", "0.25"
PALETTE = ["#0072B2", "#009E73", "#CC79A7", "#8C6D31", "#56B4E9", "#E69F00", "#7B5EA7", "#222222"]


def times(result: dict, cases: Cases) -> Figure:
    """A panel a shape: providers from fast to slow, on a logarithmic scale of time."""
    columns = min(len(cases), 3)
    lines = -(-len(cases) // columns)
    most = max(len(_timed(rows)) for _, rows in cases)
    size = (5.4 * columns, lines * (1.1 + 0.29 * most))
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (case, rows) in zip(panels, cases, strict=False):
        timed, ours = _timed(rows), rows.get(OURS.name)
        for place, row in enumerate(timed):
            time, colour = longest(row), colour_of(row["provider"])
            axes.plot([time["ms_20"], time["ms_80"]], [place, place], color=colour, lw=6, alpha=0.3)
            axes.plot(time["ms"], place, "o", color=colour, ms=7)
            times = ""
            if ours and counts(ours) and row is not ours:
                times = f"   {time['ms'] / longest(ours)['ms']:.2g}×"
            label, right = f"{figures(time['ms'])}{times}", (time["ms_80"], place)
            _note(axes, label, right, (8, 0), colour, va="center")
        names = [row["provider"] + _other_loss(row) for row in timed]
        axes.set_yticks(range(len(timed)), names, fontsize=9)
        values = [longest(row)["ms"] for row in timed]
        low, high = min(values) / 1.5, max(values) * 1.5
        room = (high / low) ** 0.3  # for the last label
        axes.set(xscale="log", xlim=(low, high * room), ylim=(most - 0.4, -0.6))
        title = f"N = {case.n}, D = {case.d}, C = {_count(case.c)}"
        axes.set_title(title, fontsize=10.5, loc="left", color=TEXT)
        axes.set_xlabel(f"{_time_label(rows)} ({case.dtype}, m = {case.margin})", color=TEXT)
        _plain(axes, "x")
        axes.tick_params(axis="y", length=0)
        for tick, row in zip(axes.get_yticklabels(), timed, strict=True):
            tick.set(color=colour_of(row["provider"]), weight="bold" if is_ours(row) else "normal")
        axes.spines["left"].set_visible(False)
    for axes in panels[len(cases) :]:
        axes.remove()
    return figure


def roofline(result: dict, cases: Cases) -> Figure:
    """Ours and the plain loss under what bandwidth and matrix rate allow."""
    dtype = cases[0][0].dtype
    bandwidth, rate = result["limits"]["bandwidth"], result["limits"]["flops"][dtype]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    works = [least(case, "forward_backward") for case, _ in cases]
    intensity = [work.flops / work.bytes for work in works]
    edge = rate / bandwidth
    left, right = min(*intensity, edge) / 4, max(*intensity, edge) * 15
    unit, size = ("TFLOP/s", 1e12) if rate >= 1e12 else ("GFLOP/s", 1e9)
    roof = [left, edge, right]
    axes.plot(roof, [min(i * bandwidth, rate) / size for i in roof], color="0.35", lw=1.5)
    flat = f"large matrix product, {figures(rate / size)} {unit}"
    _note(axes, flat, (right, rate / size), (-4, 6), TEXT, ha="right")
    slope = f"copy, {figures(bandwidth / 1e9)} GB/s"
    _note(axes, slope, (left, left * bandwidth / size), (14, -6), TEXT)
    for name in (PLAIN, OURS.name):
        done = [
            (i, case, rows[name]["forward_backward"]["tflops"] * 1e12 / size)
            for i, (case, rows) in zip(intensity, cases, strict=True)
            if name in rows and rows[name]["status"] == "ok" and rows[name]["forward_backward"]
        ]
        for i, case, value in done:
            axes.plot(i, value, "o", color=colour_of(name), ms=8, zorder=3)
            if name == OURS.name:
                label = f"{case.n}, {case.d}, {_count(case.c)}"
                _note(axes, label, (i, value), (0, -16), colour_of(name), ha="center")
        if done:
            axes.plot([], [], "o", color=colour_of(name), ms=8, label=name)
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.margins(y=0.12)
    axes.set_xlabel("operations a byte: 6 N C D over inputs and gradients, each once", color=TEXT)
    axes.set_ylabel(f"6 N C D over the time, {unit}", color=TEXT)
    title = f"forward + backward, {dtype}; labels: N, D, C"
    axes.set_title(title, loc="left", fontsize=10.5, color=TEXT)
    axes.legend(frameon=False, loc="lower right")
    _plain(axes, "xy")
    return figure


def memory(result: dict, cases: Cases) -> Figure:
    figure = Figure(figsize=(9.4, 5.4), layout="constrained")
    axes = figure.subplots()
    lines = _curves(cases, lambda row: (row["peak_bytes"] or 0) / 1e6, "c")
    lines.pop(PRODUCTS.name, None)
    _draw_curves(axes, lines)
    axes.set_ylabel("peak memory above inputs and gradients, MB", color=TEXT)
    _series_axes(axes, cases, "c")
    return figure


def cost(result: dict, series: dict[str, Cases]) -> Figure:
    figure = Figure(figsize=(9.4 * len(series), 5.4), layout="constrained")
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    for axes, (axis, cases) in zip(panels, series.items(), strict=True):
        _draw_curves(axes, _curves(cases, lambda row: (longest(row) or {}).get("ms"), axis))
        axes.set_ylabel(_time_label(cases[0][1]), color=TEXT)
        _series_axes(axes, cases, axis)
    return figure


def colour_of(name: str) -> str:
    """The same for a provider in every chart."""
    if name == PRODUCTS.name:
        return LIMIT_COLOUR
    if name.startswith(OURS.name):
        return OUR_COLOUR
    names = [p.name for p in PROVIDERS if p is not PRODUCTS and not p.name.startswith(OURS.name)]
    return PALETTE[names.index(name) % len(PALETTE)] if name in names else TEXT


def _timed(rows: dict[str, dict]) -> list[dict]:
    """The products, then the ranked."""
    limits = [row for row in rows.values() if row["provider"] == PRODUCTS.name and longest(row)]
    return limits + ranked(rows.values())


def _curves(cases: Cases, value: Callable[[dict], float | None], axis: str) -> dict:
    """For each provider its points (size, value), where there are two or more."""
    points: dict[str, list[tuple[int, float]]] = {}
    for case, rows in cases:
        for row in rows.values():
            if row["status"] == "ok" and value(row):
                points.setdefault(row["provider"], []).append((getattr(case, axis), value(row)))
    return {name: line for name, line in points.items() if len(line) > 1}


def _draw_curves(axes: Axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Lines with their names to the right of their ends, apart where they would overlap."""
    for name, points in lines.items():
        style: dict = {"lw": 1.8, "ms": 5}
        if name == PRODUCTS.name:
            style = {"lw": 1.4, "ms": 4, "ls": (0, (4, 3))}
        elif name == OURS.name:
            style = {"lw": 3.2, "ms": 8, "zorder": 3}
        elif name.startswith(OURS.name):  # one of its regimes
            style = {"lw": 1.6, "ms": 5, "ls": (0, (1, 1.5)), "zorder": 4}
        axes.plot(*zip(*points, strict=True), marker="o", color=colour_of(name), **style)
    logs = [math.log10(value) for points in lines.values() for _, value in points]
    span = max(max(logs) - min(logs), 1.0)
    ends = sorted((math.log10(points[-1][1]), name) for name, points in lines.items())
    places = _apart([end for end, _ in ends], 0.05 * span)
    aside = offset_copy(axes.transData, axes.figure, x=28, units="points")
    for (end, name), place in zip(ends, places, strict=True):
        size, colour = lines[name][-1][0], colour_of(name)
        leader = {"arrowstyle": "-", "color": colour, "lw": 0.7, "relpos": (0, 0.5), "shrinkB": 5}
        how = {"xytext": (size, 10**place), "textcoords": aside, "arrowprops": leader}
        axes.annotate(name, (size, 10**end), color=colour, fontsize=9, va="center", **how)
    low, high = min(*logs, *places) - 0.06 * span, max(*logs, *places) + 0.06 * span
    axes.set_ylim(10**low, 10**high)


def _apart(places: list[float], gap: float) -> list[float]:
    """Ascending numbers moved until neighbours differ by `gap`: groups spread about their means."""
    groups: list[list[float]] = []
    for place in places:
        group = [place]
        while groups and _start(groups[-1], gap) + len(groups[-1]) * gap > _start(group, gap):
            group = groups.pop() + group
        groups.append(group)
    return [_start(group, gap) + k * gap for group in groups for k in range(len(group))]


def _start(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _series_axes(axes: Axes, cases: Cases, axis: str) -> None:
    sizes = [getattr(case, axis) for case, _ in cases]
    room = (max(sizes) / min(sizes)) ** 0.42  # for the names
    axes.set(xscale="log", yscale="log", xlim=(min(sizes) / 1.3, max(sizes) * room))
    axes.set_xticks(sizes, [_count(size) for size in sizes])
    axes.set_xlabel({"c": "classes C", "n": "rows N"}[axis], color=TEXT)
    case = cases[0][0]
    fixed = {"c": f"N = {case.n}, D = {case.d}", "n": f"D = {case.d}, C = {_count(case.c)}"}[axis]
    title = f"{fixed}, {case.dtype}, margin {case.margin}"
    axes.set_title(title, loc="left", fontsize=10.5, color=TEXT)
    _plain(axes, "y")
    axes.minorticks_off()


def _plain(axes: Axes, scales: str) -> None:
    """No frame, a light grid, and numbers instead of powers of ten."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color("0.7")
    axes.grid(True, which="major", axis={"xy": "both"}.get(scales, scales), color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color="0.7", labelcolor=TEXT)
    for scale in scales:
        ticks = {"x": axes.xaxis, "y": axes.yaxis}[scale]
        ticks.set_major_locator(LogLocator(10))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ticks.set_minor_formatter(NullFormatter())


def _note(axes: Axes, text: str, point: tuple, offset: tuple, colour: str, **how: str) -> None:
    """Text at a distance of `offset` points."""
    place = {"xytext": offset, "textcoords": "offset points", "fontsize": 9}
    axes.annotate(text, point, color=colour, annotation_clip=False, **place, **how)


def _other_loss(row: dict) -> str:
    return f", m = {row['margin']}" if row["margin"] != row["case"]["margin"] else ""


def _time_label(rows: dict[str, dict]) -> str:
    both = any(row["forward_backward"] for row in rows.values())
    return "forward + backward, ms" if both else "forward, ms"


def _count(size: int) -> str:
    """10k for 10000, 1M for a million."""
    for unit, letter in ((10**6, "M"), (1000, "k")):
        if size >= unit and size % (unit // 10) == 0:
            return f"{size / unit:g}{letter}"
    return str(size)
