"""Rows of results as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from . import results
from .cases import CPU_SHAPES, GPU_SHAPES, Case
from .floors import REGIMES, Work, kernels, least
from .peers import CrossEntropy, MetricLearning, Published
from .providers import OURS, PRODUCTS

PLAIN = CrossEntropy.name
NONE = "–"
FEW_SAMPLES = 5
GRADIENTS = ("dx", "dw", "dw_others")  # what errors are measured of, beside the loss


def by_case(result: dict) -> Iterator[tuple[Case, dict[str, dict]]]:
    """Every measured case, with its rows by provider."""
    for case in results.cases(result):
        rows = results.rows_of(result, case)
        if rows:
            yield case, {row["provider"]: row for row in rows}


def longest(row: dict) -> dict | None:
    """The time of the longest pass that was taken; None where a pass was not that should have."""
    if row["status"] in ("failed", "out of memory"):
        return None
    return row["forward_backward"] or row["forward"]


def ranked(rows: Iterable[dict]) -> list[dict]:
    """Losses with right numbers and every gradient asked for, fastest first."""
    losses = [row for row in rows if counts(row) and row["provider"] != PRODUCTS.name]
    return sorted(losses, key=lambda row: longest(row)["ms"])


def counts(row: dict) -> bool:
    """Whether its time counts: right numbers, every gradient, every pass."""
    return row["status"] == "ok" and longest(row) is not None


def overview(*runs: dict) -> str:
    """The standard shapes at margins above 1: ours beside those that a user would think of. Empty
    where there are none.
    """
    heads = ["N, D, C", "type", "ours, ms", PLAIN, Published.name, MetricLearning.name]
    heads += ["fastest other", "products alone", f"ours / {PLAIN}"]
    heads += ["peak MB: ours", PLAIN, "error: loss", "gradient"]
    shapes = list(dict.fromkeys(GPU_SHAPES + CPU_SHAPES))
    shown = [
        (case, rows)
        for run in runs
        for case, rows in by_case(run)
        if case.margin > 1 and case.shape in shapes and OURS.name in rows
    ]
    types = list(dict.fromkeys(case.dtype for case, _ in shown))
    shown.sort(key=lambda pair: (types.index(pair[0].dtype), shapes.index(pair[0].shape)))
    lines = []
    for case, rows in shown:
        ours, plain = rows[OURS.name], rows.get(PLAIN)
        others = [row for row in ranked(rows.values()) if not is_ours(row)]
        lines.append(
            [
                ", ".join(f"{size:,}".replace(",", " ") for size in case.shape),
                case.dtype,
                overall(ours),
                *(milliseconds(rows.get(n)) for n in (PLAIN, Published.name, MetricLearning.name)),
                f"{milliseconds(others[0])} {others[0]['provider']}" if others else NONE,
                milliseconds(rows.get(PRODUCTS.name)),
                ratio(ours, plain),
                megabytes(ours),
                megabytes(plain),
                error(ours, "loss"),
                error(ours, *GRADIENTS),
            ]
        )
    return table(heads, lines) if lines else ""


def case_table(rows: Sequence[dict]) -> str:
    """All providers of one case: those that are ranked by their time, then the others."""
    order = ranked(rows)
    ours = next((row for row in rows if row["provider"] == OURS.name), None)
    limits = [row for row in rows if row["provider"] == PRODUCTS.name]
    heads = ["", "provider", "forward, ms", "forward + backward, ms", "/ ours", "FLOP/s"]
    heads += ["/ products", "/ floor", "peak MB", "launches", "error: loss", "gradient", ""]
    lines = []
    for row in [*limits, *order, *(row for row in rows if row not in limits + order)]:
        time = longest(row) or {}
        lines.append(
            [
                str(order.index(row) + 1) if row in order else "",
                row["provider"],
                spread(row["forward"]),
                spread(row["forward_backward"]),
                ratio(row, ours),
                rate(time.get("tflops")),
                figures(time.get("products_ratio")),
                figures(time.get("floor_ratio")),
                megabytes(row),
                NONE if row["launches"] is None else str(row["launches"]),
                error(row, "loss"),
                error(row, *GRADIENTS),
                remark(row),
            ]
        )
    return table(heads, lines)


def counted(case: Case, limits: dict | None, measured: dict | None) -> str:
    """Bytes and operations of our kernels in one forward + backward, regime by regime.

    With `limits` also the least time of each; with `measured`, our row of this case on a GPU, what
    the profiler saw.
    """
    heads = ["regime", "kernel", "MB", "GFLOP", *(["least, us"] if limits else [])]

    def line(regime: str, work: Work, seconds: float | None) -> list[str]:
        time = [] if seconds is None else [figures(seconds * 1e6)]
        return [regime, work.name, figures(work.bytes / 1e6), figures(work.flops / 1e9), *time]

    def seconds(work: Work) -> float | None:
        return limits and work.seconds(limits, case.dtype)

    lines = []
    for regime in REGIMES:
        works = kernels(case, regime)
        total = Work("all", sum(w.bytes for w in works), sum(w.flops for w in works))
        lines += [line("", work, seconds(work)) for work in works]
        lines.append(line(f"**{regime}**", total, limits and sum(map(seconds, works))))
    bound = least(case, "forward_backward")
    lines.append(line("**any implementation**", bound, seconds(bound)))
    text = table(heads, lines)
    if measured and measured["kernels"]:
        seen = [[k["name"], str(k["calls"]), figures(k["us"])] for k in measured["kernels"]]
        text += "\n\nSeen by the profiler:\n\n" + table(["kernel", "calls", "us"], seen)
    return text


# ---- cells --------------------------------------------------------------------------------------


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body)


def is_ours(row: dict) -> bool:
    return row["provider"].startswith(OURS.name)


def figures(value: float | None) -> str:
    """About three significant digits, never an exponent for what is not tiny."""
    if value is None:
        return NONE
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text else text


def rate(tflops: float | None) -> str:
    if tflops is None:
        return NONE
    unit, size = next(((u, v) for u, v in (("T", 1), ("G", 1e-3)) if tflops >= v), ("M", 1e-6))
    return f"{figures(tflops / size)} {unit}"


def milliseconds(row: dict | None) -> str:
    """The median; in brackets what is not ranked; a word where there is no time."""
    if row is None:
        return NONE
    time = longest(row)
    if time is None:
        return row["status"]
    return figures(time["ms"]) if row["status"] == "ok" else f"({figures(time['ms'])})"


def overall(row: dict) -> str:
    """Median and spread of the longest pass; as ``milliseconds`` where that is not ranked."""
    return spread(longest(row)) if counts(row) else milliseconds(row)


def spread(time: dict | None) -> str:
    """Median (20th to 80th percentile); and of how many samples where they are few."""
    if time is None:
        return NONE
    words = [f"{figures(time['ms_20'])} to {figures(time['ms_80'])}"]
    if time["samples"] < FEW_SAMPLES:
        words = [*(words if time["samples"] > 1 else []), f"of {time['samples']}"]
    return f"{figures(time['ms'])} ({', '.join(words)})"


def ratio(row: dict, other: dict | None) -> str:
    if other is None or not counts(row) or not counts(other):
        return NONE
    return f"{longest(row)['ms'] / longest(other)['ms']:.2f}"


def megabytes(row: dict | None) -> str:
    if row is None or row["peak_bytes"] is None:
        return NONE
    return figures(row["peak_bytes"] / 1e6)


def error(row: dict, *names: str) -> str:
    """The worst of the named errors."""
    values = [row["errors"][name] for name in names] if row["errors"] else [None]
    return NONE if None in values else f"{max(values):.0e}"


def remark(row: dict) -> str:
    """What else is to be known: another loss than the one asked for, and why there is no rank."""
    words = []
    if longest(row) and row["margin"] != row["case"]["margin"]:
        words.append(f"margin {row['margin']}")
    elif longest(row) and row["margin"] > 1 and row["lam"] == 0:
        words.append("λ = 0")
    if row["status"] != "ok":
        words.append(f"**{row['status']}**: {row['note']}")
    return ", ".join(words)


def case_title(case: Case) -> str:
    n, d, c = case.shape
    return f"N = {n}, D = {d}, C = {c}, {case.dtype}, margin {case.margin}"
