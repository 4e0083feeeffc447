"""The harness that measures: what it calls right, what it times, and what it says of failures."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch.nn import functional as F

import harness  # noqa: F401  (makes `import benchmarks` work)
from benchmarks import accuracy, cases, floors, memory, timing
from benchmarks.cases import Case
from benchmarks.launches import device_work
from benchmarks.peers import CrossEntropy, LinearCrossEntropy, MetricLearning, Published
from benchmarks.provider import Bound, Provider, UnsupportedError
from benchmarks.providers import (
    OURS,
    PRODUCTS,
    PROVIDERS,
    REFERENCE,
    Function,
    Regime,
    regime_of,
)
from benchmarks.run import Settings, measure
from benchmarks.tables import ranked
from lsoftmax import functional, reference
from problems import problem, relative_error

CPU = torch.device("cpu")
LIMITS = {"bandwidth": 1e10, "flops": dict.fromkeys(floors.SIZES, 1e11)}
CASE = Case(n=24, d=6, c=130, dtype="float32", margin=3)  # more classes than are compared


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*providers: Provider, case: Case = CASE, **changes) -> dict[str, dict]:
    """The rows of one short measurement, by provider."""
    options = {"passes": list(floors.PASSES), "graph": False, "cold": False, "quick": True}
    options |= {"seconds": 1e-3, "rounds": 1, "providers": [], "lam": 2.0, "threads": 1}
    settings = Settings(device="cpu", **(options | changes))
    return {row["provider"]: row for row in measure(case, providers, settings, LIMITS)}


def named(name: str, loss) -> Function:
    return Function(name, loss, arrays=1)


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(5, 3, 2), (70, 4, 9), (90, 5, 300)])
def test_truth_is_the_reference(monkeypatch, shape, margin):
    # In slices of a few classes, and with fewer rows compared than there are.
    monkeypatch.setattr(accuracy, "SLICE_BYTES", 8 * max(shape) * 7)
    p = problem(*shape, norm=3.0)
    truth = accuracy.Truth(p.x.detach(), p.w.detach(), p.y)
    results = truth.results(margin, 0.75)
    loss, dx, dw = p.true_loss(margin=margin, lam=0.75)
    upstream = 0.5  # what Problem passes for a scalar
    expected = {"loss": loss, "dx": dx[truth.rows] / upstream, "dw": dw[truth.targets] / upstream}
    expected["dw_others"] = dw[truth.others] / upstream
    for name, value in expected.items():
        # Both are float64; the harness needs 1e-8, and psi costs either some digits.
        assert relative_error(results[name], value) < 1e-9, name
    assert set(truth.targets.tolist()) <= set(p.y.tolist())
    assert not set(truth.others.tolist()) & set(p.y.tolist())
    assert truth.rows[-1] == shape[0] - 1  # the last row too


@pytest.mark.parametrize(
    ("dtype", "margin"),
    [("float32", 1), ("float32", 4), ("float64", 3), ("bfloat16", 4), ("float16", 2)],
)
def test_every_provider_is_right_or_says_why_not(dtype, margin):
    pytest.importorskip("pytorch_metric_learning")
    here = [provider for provider in PROVIDERS if not provider.slow_start]
    rows = run(*here, case=Case(33, 7, 41, dtype, margin))
    assert len(rows) == len(here)
    for name in (PRODUCTS.name, OURS.name, REFERENCE.name, CrossEntropy.name):
        assert rows[name]["status"] == "ok", rows[name]
    for row in rows.values():
        assert row["status"] in ("ok", "unsupported", "not installed", "wrong numbers"), row
        assert row["status"] != "wrong numbers" or dtype == "float16", row
    assert rows[CrossEntropy.name]["margin"] == rows[LinearCrossEntropy.name]["margin"] == 1
    assert rows[MetricLearning.name]["lam"] == 0
    assert rows[Published.name]["margin"] == margin
    assert rows[OURS.name]["forward"]["ms"] > 0
    assert rows["liger-kernel"]["note"] == "needs CUDA"


def test_each_regime_is_forced():
    x, w, _ = cases.draw(Case(512, 8, 2000, "float32", 2), CPU)
    for regime in floors.REGIMES:
        budget = Regime(regime).budget(x, w)
        assert regime_of(functional.plan(x, w, memory_budget=budget)) == regime
    with pytest.raises(UnsupportedError, match="leads to row chunks"):
        Regime("row chunks").budget(x[:3], w)


def twice_the_gradient(x, w, y, margin, lam):
    loss = reference.lsoftmax_loss(x, w, y, margin, lam)
    return 2 * loss - loss.detach()


def another_margin(x, w, y, margin, lam):
    return reference.lsoftmax_loss(x, w, y, margin + 1, lam)


def not_a_number(x, w, y, margin, lam):
    return reference.lsoftmax_loss(x, w, y, margin, lam) * math.nan


def no_gradient_of_others(x, w, y, margin, lam):
    """Right for the classes that are a target, zero for the others."""
    is_target = torch.zeros(len(w), 1).index_fill(0, y, 1.0)
    w = torch.where(is_target > 0, w, w.detach())
    return reference.lsoftmax_loss(x, w, y, margin, lam)


def wrong_in_the_last_row(x, w, y, margin, lam):
    x = torch.cat([x[:-1], x[-1:].detach()])
    return reference.lsoftmax_loss(x, w, y, margin, lam)


@pytest.mark.parametrize(
    "loss",
    [
        twice_the_gradient,
        another_margin,
        not_a_number,
        no_gradient_of_others,
        wrong_in_the_last_row,
    ],
)
def test_wrong_numbers_are_flagged_and_not_ranked(loss):
    rows = run(PRODUCTS, OURS, named("culprit", loss))
    assert rows["culprit"]["status"] == "wrong numbers"
    assert "off by" in rows["culprit"]["note"]
    assert rows["culprit"]["forward_backward"]["ms"] > 0
    assert [row["provider"] for row in ranked(rows.values())] == [OURS.name]


def test_a_missing_gradient_is_marked_and_not_ranked():
    def of_features_alone(x, w, y, margin, lam):
        return reference.lsoftmax_loss(x, w.detach(), y, margin, lam)

    def of_nothing(x, w, y, margin, lam):
        return reference.lsoftmax_loss(x.detach(), w.detach(), y, margin, lam)

    rows = run(OURS, named("half", of_features_alone), named("none", of_nothing))
    assert (rows["half"]["status"], rows["half"]["note"]) == ("no gradient", "gives no dw")
    assert rows["none"]["note"] == "gives no dx and no dw"
    assert rows["half"]["errors"]["dw"] is None
    assert rows["half"]["errors"]["dx"] < 1e-4
    assert [row["provider"] for row in ranked(rows.values())] == [OURS.name]


def test_float16_gradients_are_scaled_for_everyone():
    # Unscaled, 1 / (N C) would be 0 in float16.
    case = Case(300, 4, 20_000, "float16", 2)
    rows = run(OURS, CrossEntropy(), case=case)
    assert cases.gradient_scale(case) == 4800
    assert cases.gradient_scale(CASE) == 1
    for row in rows.values():
        assert row["status"] == "ok", row
        assert row["errors"]["dw_others"] < 0.2


# ---- failures -----------------------------------------------------------------------------------


def test_failures_are_rows_and_the_others_go_on():
    def exhausted(x, w, y, margin, lam):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore.")

    def exhausted_cpu(x, w, y, margin, lam):
        torch.empty(10**15)

    def broken(x, w, y, margin, lam):
        raise ValueError("no such thing")

    class Missing(CrossEntropy):
        name, requires, package = "missing", "surely_no_such_module", "no-such-package"

    class Huge(CrossEntropy):
        name, arrays = "huge", 1e15

    class Choosy(CrossEntropy):
        name, types = "choosy", ("bfloat16",)

    failing = [named(f.__name__, f) for f in (exhausted, exhausted_cpu, broken)]
    rows = run(*failing, Missing(), Huge(), Choosy(), OURS)
    said = {name: (row["status"], row["note"]) for name, row in rows.items()}
    note = "CUDA out of memory. Tried to allocate 20 GiB."
    assert said["exhausted"] == ("out of memory", note)
    assert said["exhausted_cpu"][0] == "out of memory"
    assert said["broken"] == ("failed", "no such thing")
    assert said["missing"] == ("not installed", "pip install no-such-package")
    assert said["huge"][0] == "out of memory"
    assert "are free" in said["huge"][1]
    assert said["choosy"] == ("unsupported", "takes bfloat16 only")
    assert said[OURS.name][0] == "ok"
    assert [row["provider"] for row in ranked(rows.values())] == [OURS.name]


def test_one_that_fails_only_when_timed():
    calls = iter(range(10**6))

    def late(x, w, y, margin, lam):
        if next(calls) > 6:
            raise RuntimeError("too late")
        return reference.lsoftmax_loss(x, w, y, margin, lam)

    rows = run(named("late", late), OURS, rounds=30, seconds=0.5)
    assert (rows["late"]["status"], rows["late"]["note"]) == ("failed", "too late")
    assert rows["late"]["forward_backward"] is None
    assert rows[OURS.name]["forward_backward"]["samples"] > 1


# ---- time and memory ----------------------------------------------------------------------------


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
    assert device_work(step, CPU) is None


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
