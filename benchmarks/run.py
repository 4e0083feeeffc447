"""One case: every provider checked against the truth, then all timed in one interleaving."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from . import floors
from .accuracy import Outputs, Truth, wrong
from .cases import Case, draw, gradient_scale
from .launches import device_work
from .memory import is_out_of_memory, peak_bytes, too_large
from .provider import Bound, Provider, UnsupportedError
from .providers import PRODUCTS
from .timing import Graphs, clock_for, interleaved

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
    deviation: float = 1.0  # of the logits


class DeviceLostError(RuntimeError):
    """After a provider's failure the device does no more work for this process."""

    def __init__(self, provider: str, note: str) -> None:
        super().__init__(f"{provider}: {note}")
        self.provider, self.note = provider, note


def measure(
    case: Case,
    providers: Sequence[Provider],
    settings: Settings,
    limits: dict,
    progress: Callable[[str], object] = lambda text: None,
    lost: Mapping[str, str] = MappingProxyType({}),
) -> list[dict]:
    """A row for every provider, whatever becomes of it; benchmarks/schema.json says what is in one.

    `progress` is called with the name of each provider when it is about to be checked, and with
    "timing" at last. `lost` has those that took the device with them before, which are not tried
    again, and how.

    Raises:
        DeviceLostError: one does so now.
    """
    device = torch.device(settings.device)
    torch._dynamo.reset()  # else a case after the eighth shape would run uncompiled
    gc.collect()
    gc.freeze()  # what is there to stay: looking through it takes longer than many a case
    x, w, y = draw(case, device, settings.deviation)
    truth, scale, graphs = Truth(x, w, y), gradient_scale(case), Graphs()
    rows, calls = [], {}
    for provider in providers:
        progress(provider.name)
        row = _blank(case, provider, settings.lam)
        rows.append(row)
        row["status"], row["note"] = _obstacle(provider, case, device)
        if provider.name in lost:
            row["status"], row["note"] = "failed", lost[provider.name]
        if row["status"] == "ok":
            try:
                bound, frozen = _bind(provider, (x, w, y), settings, case)
                if not provider.limit:
                    _check(row, truth, scale, bound, frozen)
                functions = functions_of(bound, frozen, settings, scale)
                row["peak_bytes"] = peak_bytes(functions[settings.passes[-1]], device)
                if settings.graph:
                    check = None if provider.limit else partial(_check_replays, row, truth, scale)
                    functions = _captured(functions, graphs, bound.transposed, check)
                calls |= {(provider.name, which): call for which, call in functions.items()}
            except Exception as error:  # a provider may fail in any way, and the others go on
                _fail(row, error)
                look_at(device, row)
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
            look_at(device, by_name[name])  # the first that failed is the one to blame
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


def look_at(device: torch.device, row: dict) -> None:
    """After a failure: DeviceLostError where it was such that all that follows would fail too."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise DeviceLostError(row["provider"], row["note"]) from None


def _bind(
    provider: Provider, inputs: tuple[Tensor, Tensor, Tensor], settings: Settings, case: Case
) -> tuple[Bound, Bound]:
    """The loss of inputs that want gradients, and of the same that want none."""
    x, w, y = inputs
    wanting = provider.bind(x, w, y, case.margin, settings.lam)
    return wanting, provider.bind(x.detach(), w.detach(), y, case.margin, settings.lam)


def _check(row: dict, truth: Truth, scale: float, bound: Bound, frozen: Bound) -> None:
    losses = bound.loss().detach(), frozen.evaluate()
    outputs = Outputs(bound.step(scale), losses, bound.transposed)
    errors = truth.errors(outputs, row["margin"], row["lam"], scale)
    reason = wrong(errors, row["case"]["dtype"])
    missing = [name for name in ("dx", "dw") if errors[name] is None]
    if reason:
        row["status"], row["note"] = "wrong numbers", reason
    elif missing:
        row["status"], row["note"] = "no gradient", f"gives no {' and no '.join(missing)}"
    finite = {k: v if v is None or math.isfinite(v) else None for k, v in errors.items()}
    row["errors"] = finite


def _check_replays(row: dict, truth: Truth, scale: float, outputs: Outputs) -> None:
    """What replays of graphs gave; some of it may not have been asked for."""
    reason = wrong(truth.errors(outputs, row["margin"], row["lam"], scale), row["case"]["dtype"])
    if reason:
        row["status"], row["note"] = "wrong numbers", f"as a graph: {reason}"


def functions_of(
    bound: Bound, frozen: Bound, settings: Settings, scale: float
) -> dict[str, Callable[[], tuple]]:
    """What is to be timed, by pass, from the shortest to the longest."""

    def forward() -> tuple:
        return (frozen.evaluate(),)

    def step() -> tuple:
        return bound.step(scale)

    functions = {"forward": forward, "forward_backward": step}
    return {which: functions[which] for which in settings.passes}


def _captured(
    functions: dict[str, Callable[[], tuple]],
    graphs: Graphs,
    transposed: bool,
    check: Callable[[Outputs], None] | None,
) -> dict[str, Callable[[], object]]:
    """The same as replays of CUDA graphs, of which the first is checked."""
    captured = {which: graphs.capture(function) for which, function in functions.items()}
    replays = {which: replay for which, (replay, _) in captured.items()}
    if check is not None:
        for replay in replays.values():
            replay()
        _, gradients = captured.get("forward_backward", (None, (None, None)))
        _, losses = captured.get("forward", (None, ()))
        check(Outputs(gradients, losses, transposed))
    return replays


def list_kernels(
    rows: Sequence[dict],
    case: Case,
    providers: Sequence[Provider],
    settings: Settings,
    progress: Callable[[str], object] = lambda text: None,
) -> None:
    """To the rows of a case: what the longest pass starts on a GPU, of whoever lists it.

    After all cases have been timed: what watches kernels stays with a process and makes starting
    one slower from then on.
    """
    device = torch.device(settings.device)
    inputs = draw(case, device, settings.deviation)
    by_name = {row["provider"]: row for row in rows if to_list(row, providers, device)}
    for provider in providers:
        row = by_name.get(provider.name)
        if row is None:
            continue
        progress(provider.name)
        row["kernels"] = []  # of one that fails now, whose times are kept all the same
        with suppress(Exception):
            both = _bind(provider, inputs, settings, case)
            functions = functions_of(*both, settings, gradient_scale(case))
            row["kernels"] = device_work(functions[settings.passes[-1]])
            row["launches"] = sum(kernel["calls"] for kernel in row["kernels"])
        both = functions = None  # what they hold, before the next one comes
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def to_list(row: dict, providers: Sequence[Provider], device: torch.device) -> bool:
    """Whether kernels are to be listed in this row that are not yet."""
    profiled = {provider.name for provider in providers if provider.profiled}
    timed = row["forward_backward"] or row["forward"]
    fits = row["status"] in ("ok", "wrong numbers", "no gradient")
    on_gpu = device.type == "cuda"
    listed = row["kernels"] is not None
    return bool(on_gpu and fits and timed and row["provider"] in profiled and not listed)


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
