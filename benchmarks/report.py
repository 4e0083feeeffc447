"""The report: Markdown and charts from results files, and from nothing but those files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import ROOT, charts, results
from .cases import GPU_SHAPES, Case
from .providers import OURS
from .tables import by_case, case_table, case_title, counted, overview

README = ROOT / "README.md"
BEGIN = "<!-- `python -m benchmarks report` writes from here -->"
END = "<!-- to here -->"
NO_GPU = "Not measured on a GPU yet."

# What our kernels must move is listed for these, in the type that GPUs are for.
COUNTED = [Case(*shape, "bfloat16", 4) for shape in GPU_SHAPES if shape[2] >= 10_000]

LEGEND = """\
Times: the median of all samples (20th to 80th percentile; of how many, where they are few), all
providers interleaved in one run; forward is without gradients. Ranked are right numbers with every
gradient asked for. FLOP/s: 2 N C D operations forward, 6 N C D with backward, over the time.
Products: the bare matrix products of the same pass. Floor: inputs read and gradients written once,
or the operations, by the bandwidth and the matrix rate measured in the same run. Peak: torch's
allocations above inputs and gradients. Errors: relative, against float64 on the same inputs, in
some rows of each gradient."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Render results. Without arguments: the committed ones, into their folder and "
        "the README's section.",
    )
    parser.add_argument("files", type=Path, nargs="*", help="results files")
    parser.add_argument("--output", type=Path, help="folder (%(default)s)")
    args = parser.parse_args(arguments)
    runs = {path.name: results.load(path) for path in args.files or results.committed()}
    folder = args.output or results.RESULTS
    for name, result in runs.items():
        for chart in charts.available(result):
            results.write_bytes(folder / picture(name, chart), chart.draw(result))
    results.write_text(folder / "README.md", full(runs))
    if not args.files:
        results.write_text(README, with_section(README.read_text(), section(runs)))
    print(f"Written: {folder / 'README.md'}")


def with_section(readme: str, text: str) -> str:
    """The README with its generated section exchanged. ValueError where its markers are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def section(runs: dict[str, dict]) -> str:
    """The README's: one table for all runs of one machine and one state of the code."""
    together: dict[tuple, dict[str, dict]] = {}
    for name, result in runs.items():
        key = where(result), result["machine"]["commit"]
        together.setdefault(key, {})[name] = result
    parts = []
    for (device, _), those in together.items():
        text = overview(*those.values())
        if text:
            shown = [name for name, result in those.items() if overview(result)]
            links = [f"[{name}](benchmarks/results/{name}){how_far(those[name])}" for name in shown]
            parts += [text, "", f"{device}. From {', '.join(links)}.", ""]
    return "\n".join(parts + no_gpu(runs))


def full(runs: dict[str, dict]) -> str:
    """Every row of every run, the charts, and what our kernels must move."""
    parts = ["# Results", "", LEGEND, "", *no_gpu(runs)]
    for name, result in runs.items():
        parts += [f"## {where(result)}", "", facts(name, result), "", overview(result), ""]
        for chart in charts.available(result):
            parts += [f"![{chart.title}]({picture(name, chart)})", ""]
        for case, rows in by_case(result):
            parts += [f"### {case_title(case)}", "", case_table(list(rows.values())), ""]
    parts += ["## What our kernels must move", "", "In one forward + backward.", ""]
    gpu = next((result for result in runs.values() if result["machine"]["gpu"]), None)
    seen = {case: rows.get(OURS.name) for case, rows in by_case(gpu)} if gpu else {}
    for case in COUNTED:
        limits = gpu["limits"] if gpu and case.dtype in gpu["limits"]["flops"] else None
        parts += [f"### {case_title(case)}", "", counted(case, limits, seen.get(case)), ""]
    return "\n".join(parts)


def how_far(result: dict) -> str:
    """In brackets what a run left out, if anything."""
    settings = result["settings"]
    words = ["quick"] if settings["quick"] else []
    if not any("compiled" in name for name in settings["providers"]):
        words.append("without what is compiled")
    if not result["complete"]:
        words.append("interrupted")
    return f" ({', '.join(words)})" if words else ""


def where(result: dict) -> str:
    """The device in a few words."""
    facts = result["machine"]
    device = facts["gpu"]["name"] if facts["gpu"] else f"{facts['cpu']}, {facts['threads']} threads"
    cuda = f", CUDA {facts['cuda']}" if facts["gpu"] else ""
    graph = ", CUDA graphs" if result["settings"]["graph"] else ""
    return f"{device}, torch {facts['torch']}{cuda}{graph}"


def facts(name: str, result: dict) -> str:
    """What else a reader needs to repeat the run."""
    machine, settings, limits = result["machine"], result["settings"], result["limits"]
    rates = [f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in limits["flops"].items()]
    beside = [f", {package} {version}" for package, version in machine["packages"].items()]
    beside += [f", {name}={value}" for name, value in machine.get("environment", {}).items()]
    how = "CUDA graphs" if settings["graph"] else "eager calls"
    deviation = settings.get("deviation", 1.0)
    spread_out = "" if deviation == 1 else f", logits' deviation {deviation:g}"
    done = "" if result["complete"] else " It was interrupted: cases are missing."
    return (
        f"`{result['command']}`, [{name}]({name}). {machine['date']}, commit {machine['commit']}"
        f"{' with changes' if machine['dirty'] else ''}, Python {machine['python']}"
        f"{''.join(beside)}; load before: {machine['load']:.2f}; {how}, "
        f"{'cold' if settings['cold'] else 'hot'} caches; λ = {settings['lam']:g}{spread_out}. "
        f"Measured limits: {limits['bandwidth'] / 1e9:.3g} GB/s, {', '.join(rates)}.{done}"
    )


def no_gpu(runs: dict[str, dict]) -> list[str]:
    return [] if any(r["machine"]["gpu"] for r in runs.values()) else [NO_GPU, ""]


def picture(name: str, chart: charts.Chart) -> str:
    """The file of a chart, beside the report."""
    return f"{Path(name).stem}-{chart.name}.png"
