"""One case: every provider checked against the truth, then all timed in one interleaving."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from . import floors
from .accuracy import Truth, wrong
from .cases import Case, draw, gradient_scale
from .launches import device_work
from .memory import is_out_of_memory, peak_bytes, too_large
from .provider import Bound, Provider, UnsupportedError
from .providers import PRODUCTS
from .timing import clock_for, graphed, interleaved

NOTE_LENGTH = 200


@dataclass(frozen=True)
class Settings:
    """What a run does; kept in its file, and all that resuming it needs."""

    device: str
    threads: int
    lam: float
    passes: list[str]
    graph: bool  # replay captured CUDA graphs
    cold: bool  # flush the caches before every call
    seconds: float  # of timing for one case
    rounds: int  # of timing for one case, at least
    quick: bool
    providers: list[str]
    cases: list[dict] = field(default_factory=list)


def measure(
    case: Case,
    providers: Sequence[Provider],
    settings: Settings,
    limits: dict,
    progress: Callable[[str], object] = lambda text: None,
) -> list[dict]:
    """A row for every provider, whatever becomes of it; benchmarks/schema.json says what is in one.

    `progress` is called with the name of each provider when it is about to be checked, and with
    "timing" at last.
    """
    device = torch.device(settings.device)
    torch._dynamo.reset()  # else a case after the eighth shape would run uncompiled
    gc.collect()
    gc.freeze()  # what is there to stay: looking through it takes longer than many a case
    x, w, y = draw(case, device)
    truth, scale = Truth(x, w, y), gradient_scale(case)
    rows, calls = [], {}
    for provider in providers:
        progress(provider.name)
        row = _blank(case, provider, settings.lam)
        rows.append(row)
        row["status"], row["note"] = _obstacle(provider, case, device)
        if row["status"] == "ok":
            try:
                bound = provider.bind(x, w, y, case.margin, settings.lam)
                frozen = provider.bind(x.detach(), w.detach(), y, case.margin, settings.lam)
                if not provider.limit:
                    _check(row, truth, bound, scale)
                calls |= _calls(row, bound, frozen, settings, scale, provider.profiled)
            except Exception as error:  # a provider may fail in any way, and the others go on
                _fail(row, error)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    progress("timing")
    by_name = {row["provider"]: row for row in rows}
    clock = clock_for(device, settings.cold)
    times = interleaved(calls, clock, settings.seconds, settings.rounds)
    for (name, which), time in times.items():
        if isinstance(time, Exception):
            _fail(by_name[name], time)
        else:
            by_name[name][which] = time
    for row in rows:
        for which in floors.PASSES:
            if row[which]:
                _compare(row[which], by_name.get(PRODUCTS.name, {}).get(which), case, which, limits)
    return rows


def _blank(case: Case, provider: Provider, lam: float) -> dict:
    margin, own_lam = provider.computes(case.margin, lam)
    return {
        "case": case.as_dict(),
        "provider": provider.name,
        "status": "ok",
        "note": "",
        "margin": margin,  # of the loss that it computes
        "lam": own_lam,
        "forward": None,
        "forward_backward": None,
        "peak_bytes": None,
        "launches": None,
        "kernels": None,
        "errors": None,
    }


def _obstacle(provider: Provider, case: Case, device: torch.device) -> tuple[str, str]:
    """Status and note of a provider that is not to be tried; ("ok", "") of one that is."""
    reason = provider.why_not(device.type, case.dtype)
    if reason:
        return "unsupported", reason
    if not provider.installed():
        return "not installed", f"pip install {provider.package}"
    if device.type == "cpu":
        reason = too_large(provider, case.n, case.c, floors.SIZES[case.dtype])
        if reason:
            return "out of memory", reason
    return "ok", ""


def _check(row: dict, truth: Truth, bound: Bound, scale: float) -> None:
    errors = truth.errors(bound, row["margin"], row["lam"], scale)
    reason = wrong(errors, row["case"]["dtype"])
    missing = [name for name in ("dx", "dw") if errors[name] is None]
    if reason:
        row["status"], row["note"] = "wrong numbers", reason
    elif missing:
        row["status"], row["note"] = "no gradient", f"gives no {' and no '.join(missing)}"
    finite = {k: v if v is None or math.isfinite(v) else None for k, v in errors.items()}
    row["errors"] = finite


def _calls(
    row: dict, bound: Bound, frozen: Bound, settings: Settings, scale: float, profiled: bool
) -> dict[tuple[str, str], Callable[[], object]]:
    """What is to be timed; memory and launches are taken here, of the longest pass asked for."""

    def step() -> tuple:
        return bound.step(scale)

    def forward() -> tuple:
        return (frozen.evaluate(),)

    functions = {"forward": forward, "forward_backward": step}
    longest = functions[settings.passes[-1]]
    device = torch.device(settings.device)
    row["peak_bytes"] = peak_bytes(longest, device)
    row["kernels"] = device_work(longest, device) if profiled else None
    if row["kernels"] is not None:
        row["launches"] = sum(kernel["calls"] for kernel in row["kernels"])
    wanted = {which: functions[which] for which in settings.passes}
    if settings.graph:
        wanted = {which: graphed(function) for which, function in wanted.items()}
    return {(row["provider"], which): function for which, function in wanted.items()}


def _fail(row: dict, error: Exception) -> None:
    unsupported = "unsupported" if isinstance(error, UnsupportedError) else "failed"
    row["status"] = "out of memory" if is_out_of_memory(error) else unsupported
    text = str(error).strip() or type(error).__name__
    row["note"] = text.splitlines()[0][:NOTE_LENGTH]


def _compare(time: dict, products: dict | None, case: Case, which: str, limits: dict) -> None:
    """Beside a time: its rate, and its ratio to the products alone and to the floor."""
    least = floors.least(case, which)
    time["tflops"] = least.flops / time["ms"] / 1e9
    time["products_ratio"] = time["ms"] / products["ms"] if products else None
    time["floor_ratio"] = time["ms"] / 1e3 / least.seconds(limits, case.dtype)
