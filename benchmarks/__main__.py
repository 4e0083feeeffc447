"""Command line: measure, list what could be measured, or render the report."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from . import ROOT, cases, machine, results
from .floors import PASSES, SIZES, measure_limits
from .provider import Provider
from .providers import PRODUCTS, PROVIDERS
from .run import DeviceLostError, Settings, list_kernels, measure, to_list
from .tables import case_table

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    raise SystemExit('tqdm is not installed: pip install "lsoftmax[bench]"') from None


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["report"]:
        from . import report  # it needs matplotlib

        report.main(arguments[1:])
        return
    args = parse(arguments)
    if args.list:
        print(listing(args.device))
        return
    if args.resume:
        path, result = args.resume, resumed(args.resume)
    else:
        result = started(settings_of(args), arguments)
        path = args.output or new_file(result["machine"])
    again = f"python -m benchmarks --resume {path}"
    try:
        go_on(result, path)
    except KeyboardInterrupt:
        raise SystemExit(f"\nStopped. To go on: {again}") from None
    except DeviceLostError as error:
        raise SystemExit(f"\nThe device is lost: {error}\nTo go on without: {again}") from None
    print(f"Written: {path}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the layer beside everything a user could pick in its place. "
        "`python -m benchmarks report` renders the committed results.",
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--quick", action="store_true", help="the standard shapes, briefly; nothing that compiles")
    add("--shapes", type=shape, nargs="+", metavar="N,D,C", help="instead of the standard ones")
    add("--types", choices=list(SIZES), nargs="+", help="of inputs and class vectors")
    add("--margins", type=int, nargs="+", help="(4 and 1; quick: 4)")
    add("--lam", type=float, default=5.0, help="annealing weight of the plain logit (%(default)s)")
    add("--providers", nargs="+", metavar="TEXT", help="those whose names contain one of these")
    add("--passes", choices=PASSES, nargs="+", default=PASSES, help="(both)")
    add("--graph", action="store_true", help="time replays of CUDA graphs")
    add("--cold", action="store_true", help="flush the caches before every call")
    add("--seconds", type=float, help="of timing for one case (30; quick: 4)")
    add("--rounds", type=int, help="of timing for one case, at least (9; quick: 3)")
    add("--threads", type=int, default=2, help="of torch on the host (%(default)s)")
    add("--deviation", type=float, default=1.0, help="standard deviation of the logits (1)")
    add("--output", type=Path, help="a new file (build/benchmarks/DEVICE-TIME.json)")
    add("--resume", type=Path, metavar="FILE", help="go on with an interrupted run, as it began")
    add("--list", action="store_true", help="providers and shapes, and do nothing")
    args = parser.parse_args(arguments)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.graph and torch.device(args.device).type != "cuda":
        parser.error("--graph: needs --device cuda")
    if args.output and args.output.exists():
        parser.error(f"--output {args.output}: is there already; --resume goes on with a run")
    for text in args.providers or []:
        if not any(text in provider.name for provider in PROVIDERS):
            parser.error(f"--providers: no provider has {text!r} in its name; see --list")
    return args


def shape(text: str) -> cases.Shape:
    n, d, c = (int(size) for size in text.split(","))
    if min(n, d, c) < 1:
        raise ValueError
    return n, d, c


def settings_of(args: argparse.Namespace) -> Settings:
    if args.providers:
        chosen = [p for p in PROVIDERS if any(text in p.name for text in args.providers)]
    else:
        chosen = [p for p in PROVIDERS if not (args.quick and p.slow_start)]
    if PRODUCTS not in chosen:
        chosen.insert(0, PRODUCTS)
    device_type = torch.device(args.device).type
    wanted = cases.standard_cases(device_type, args.quick, args.shapes, args.types, args.margins)
    return Settings(
        device=args.device,
        threads=args.threads,
        lam=args.lam,
        passes=[which for which in PASSES if which in args.passes],
        graph=args.graph,
        cold=args.cold,
        seconds=args.seconds or (4 if args.quick else 30),
        rounds=args.rounds or (3 if args.quick else 9),
        quick=args.quick,
        providers=[provider.name for provider in chosen],
        cases=[case.as_dict() for case in wanted],
        deviation=args.deviation,
    )


def device_with(threads: int, name: str) -> torch.device:
    """The device, which is the current one from now on, as events, streams and peaks want it."""
    torch.set_num_threads(threads)
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def started(settings: Settings, arguments: Sequence[str]) -> dict:
    """A new result, without rows."""
    device = device_with(settings.threads, settings.device)
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "complete": False,
        "machine": machine.describe(device),
        "settings": asdict(settings),
        "limits": measure_limits(device, {case["dtype"] for case in settings.cases}),
        "rows": [],
    }


def resumed(path: Path) -> dict:
    """An interrupted result, as far as its cases are whole. SystemExit on another machine."""
    result = results.load(path)
    settings = result["settings"]
    here = machine.describe(device_with(settings["threads"], settings["device"]))
    other = machine.same_machine(result["machine"], here)
    if other:
        was = result["machine"]
        facts = ", ".join(f"{fact}: {was.get(fact)}, now {here[fact]}" for fact in other)
        raise SystemExit(f"{path} was begun elsewhere, and cannot go on here ({facts})")
    results.drop_incomplete(result)
    return result


def go_on(result: dict, path: Path) -> None:
    """Measure the cases that the result lacks, then list kernels; write it after each case."""
    settings = Settings(**result["settings"])
    providers: list[Provider] = [p for p in PROVIDERS if p.name in settings.providers]
    results.write(path, result)
    todo = [case for case in results.cases(result) if not results.rows_of(result, case)]
    with tqdm(total=len(todo) * (len(providers) + 1), disable=None, unit="step") as bar:

        def show(case: cases.Case, text: str) -> None:
            bar.set_description(f"{case} {text}")
            bar.update()

        for case in todo:
            lost = results.lost(result, case)
            try:
                rows = measure(
                    case, providers, settings, result["limits"], partial(show, case), lost
                )
            except DeviceLostError as error:
                results.add_lost(result, case, error.provider, error.note)
                results.write(path, result)
                raise
            result["rows"] += rows
            results.write(path, result)
            bar.write(case_table(rows) + "\n")

        device = torch.device(settings.device)
        for case in results.cases(result):
            rows = results.rows_of(result, case)
            count = sum(to_list(row, providers, device) for row in rows)
            if count:
                bar.total += count
                list_kernels(rows, case, providers, settings, partial(show, case))
                results.write(path, result)
    result["complete"] = True
    results.write(path, result)


def new_file(facts: dict) -> Path:
    """Where a run is written that was told nothing else: by the device and the time."""
    device = re.sub(r"\W+", "-", facts["gpu"]["name"].lower()) if facts["gpu"] else "cpu"
    time = re.sub(r"\D", "", facts["date"])[:14]
    return ROOT / "build" / "benchmarks" / f"{device}-{time}.json"


def listing(device: str) -> str:
    """Providers, with what is missing, and the cases of a full and of a quick run."""
    kind = torch.device(device).type
    lines = [f"Providers on {kind} (*: not in a quick run)"]
    for provider in PROVIDERS:
        missing = None if provider.installed() else f"not installed: pip install {provider.package}"
        reason = provider.why_not(kind, provider.types[0]) or missing
        star = "*" if provider.slow_start else " "
        lines.append(f"  {star} {provider.name}{f'  ({reason})' if reason else ''}")
    for quick, name in ((True, "quick"), (False, "full")):
        wanted = cases.standard_cases(kind, quick)
        lines.append(f"Cases of a {name} run: {len(wanted)}")
        lines += [f"    {case}" for case in wanted]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
