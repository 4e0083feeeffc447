"""The harness that measures: times, peaks of memory, and the floors they are held against."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

import harness  # noqa: F401  (makes `import benchmarks` work)
from benchmarks import cases, floors, memory, timing
from benchmarks.cases import Case
from benchmarks.provider import Bound
from benchmarks.providers import (
    OURS,
    PRODUCTS,
)
from lsoftmax import reference
from measuring import CASE, CPU, named, run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_known_sleep():
    clock = timing.Clock(CPU)
    nap = 0.02
    times = [clock.seconds(lambda: time.sleep(nap), 4) for _ in range(5)]
    assert all(nap <= seconds for seconds in times)
    assert min(times) < 3 * nap
    row = timing.interleaved({"nap": lambda: time.sleep(nap)}, clock, 0.2, 3)["nap"]
    assert 1e3 * nap <= row["ms_20"] <= row["ms"] <= row["ms_80"]
    assert row["ms_20"] < 3e3 * nap
    assert (row["repeats"], row["samples"] >= 3) == (1, True)


def test_cold_times_each_call_alone():
    class Counting(timing.Clock):
        spans: list[int] = []  # noqa: RUF012

        def _span(self, function, repeats):
            self.spans.append(repeats)
            return super()._span(function, repeats)

    clock = Counting(CPU, cold=True)
    clock.seconds(lambda: None, 3)
    assert clock.spans == [1, 1, 1]
    assert clock._flush.nbytes >= 2**27  # larger than any cache


class Scripted(timing.Clock):
    """Says how long each took, and remembers the order."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.times, self.order = seconds, []

    def seconds(self, function, repeats):
        self.order.append(name := function())
        return self.times[name]


def test_rounds_are_balanced():
    names = "abcd"
    functions = {name: (lambda name=name: name) for name in names}
    clock = Scripted(dict.fromkeys(names, 1e-3))
    timing.interleaved(functions, clock, 0.1, 8)
    rounds = [clock.order[k : k + 4] for k in range(8, 40, 4)]  # after two calls of each
    for name in names:
        places = [r.index(name) for r in rounds]
        assert sorted(places) == sorted([*range(4)] * 2), places
    for there, back in zip(rounds[::2], rounds[1::2], strict=True):
        assert back == there[::-1]  # so that each comes after each as often as before it


def test_percentiles_and_repeats():
    row = timing.summary([k / 1000 for k in (5, 1, 3, 2, 4)], 7)
    assert row["ms"] == pytest.approx(3)
    assert row["ms_20"] == pytest.approx(1.8)
    assert row["ms_80"] == pytest.approx(4.2)
    assert (row["samples"], row["repeats"]) == (5, 7)
    assert timing.summary([0.25], 1)["ms_80"] == 250
    assert timing.calls_for(timing.SAMPLE_SECONDS * 5) == 1
    assert timing.calls_for(timing.SAMPLE_SECONDS / 4.5) == 5
    assert timing.calls_for(0.0) == timing.MAX_REPEATS


def test_a_slow_one_sits_out():
    naps = {"slow": 0.06, "fast": 0.0}
    functions = {name: (lambda nap=nap: time.sleep(nap)) for name, nap in naps.items()}
    rows = timing.interleaved(functions, timing.Clock(CPU), 0.1, 6)
    assert rows["slow"]["samples"] == 1
    assert rows["slow"]["ms"] >= 60
    assert rows["fast"]["samples"] > 1


def test_peak_memory_is_what_a_step_allocates():
    leaf = torch.ones(1000)

    def step() -> tuple:
        large = torch.empty(2**20)  # 4 MiB
        del large
        small = torch.empty(2**18)  # 1 MiB, after the large one is gone
        return torch.ones_like(leaf), small[:0].clone()

    assert memory.peak_bytes(step, CPU) == 2**22 - 4000
    rows = run(PRODUCTS, case=Case(64, 8, 512, "float32", 1))
    assert rows[PRODUCTS.name]["peak_bytes"] == 4 * 64 * 512


def test_rates_and_ratios():
    rows = run(PRODUCTS, OURS)
    flops = 2 * 24 * 6 * 130
    for which, times in (("forward", 1), ("forward_backward", 3)):
        ours, products = rows[OURS.name][which], rows[PRODUCTS.name][which]
        assert ours["tflops"] == pytest.approx(times * flops / ours["ms"] / 1e9)
        assert ours["products_ratio"] == pytest.approx(ours["ms"] / products["ms"])
        least = 4 * 6 * (24 + 130) * (1 if which == "forward" else 2) + 8 * 24
        floor = max(least / 1e10, times * flops / 1e11)
        assert ours["floor_ratio"] == pytest.approx(ours["ms"] / 1e3 / floor)
    alone = run(OURS, passes=["forward"])[OURS.name]
    assert alone["forward_backward"] is None
    assert alone["forward"]["products_ratio"] is None


def test_what_kernels_must_move():
    case = Case(1024, 512, 100_000, "bfloat16", 4)
    product = 2 * 1024 * 512 * 100_000
    flops = {r: sum(w.flops for w in floors.kernels(case, r)) for r in floors.REGIMES}
    assert flops == {
        "in budget": 3 * product,
        "class chunks": 4 * product,
        "row chunks": 3 * product,
    }
    moved = sum(work.bytes for work in floors.kernels(case, "in budget"))
    logits = 1024 * 100_000
    # float32 logits written and read, E written and read twice, W read twice and dW written.
    assert moved == pytest.approx(logits * (4 + 4 + 2 + 2 + 2) + 3 * 2 * 512 * 100_000, rel=0.02)
    assert floors.least(case, "forward").bytes < floors.least(case, "forward_backward").bytes
    with pytest.raises(ValueError, match="expected one of"):
        floors.kernels(case, "elsewhere")


def test_inputs_are_the_same_for_everyone_and_in_every_run():
    seen = []

    def watching(x, w, y, margin, lam):
        seen.append((x.detach().clone(), w.detach().clone(), y.clone()))
        return F.linear(x, w).sum()

    run(named("a", watching), named("b", watching))
    first = cases.draw(CASE, CPU)
    for tensors in seen:
        assert all(torch.equal(a, b) for a, b in zip(tensors, first, strict=True))
    assert first[0].dtype == torch.float32
    assert float((first[0] @ first[1].t()).detach().std()) == pytest.approx(1, rel=0.3)


def test_forward_is_measured_on_inputs_that_want_no_gradients():
    seen = []

    def watching(x, w, y, margin, lam):
        seen.append((torch.is_grad_enabled(), x.requires_grad, w.requires_grad))
        return reference.lsoftmax_loss(x, w, y, margin, lam)

    run(named("watched", watching), passes=["forward"])
    assert set(seen) == {(True, True, True), (False, False, False)}


def test_bound_steps_scale():
    x = torch.ones(3, requires_grad=True)
    bound = Bound(lambda: (2 * x).sum(), (x, x))
    assert bound.step(4.0)[0].tolist() == [8.0, 8.0, 8.0]
    assert not bound.evaluate().requires_grad
