"""The harness that measures: what it calls right, and what it lists."""

from __future__ import annotations

import math
import os

import pytest
import torch

import harness  # noqa: F401  (makes `import benchmarks` work)
from benchmarks import accuracy, cases, floors, timing
from benchmarks.cases import Case
from benchmarks.peers import CrossEntropy, LinearCrossEntropy, MetricLearning, Published
from benchmarks.provider import UnsupportedError
from benchmarks.providers import (
    OURS,
    PRODUCTS,
    PROVIDERS,
    REFERENCE,
    SWITCH,
    BoundApart,
    Budgeted,
    Regime,
    regime_of,
)
from benchmarks.run import list_kernels, to_list
from benchmarks.tables import ranked
from lsoftmax import functional, reference
from measuring import CASE, CPU, named, run, settings_for
from problems import problem, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


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
    """Also where a CPU takes chunks whatever the budget is: 33 MB of logits."""
    x, w, y = cases.draw(Case(512, 8, 16_400, "float32", 2), CPU)
    chosen = []
    choose = functional.choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            functional, "choose", lambda *a, **k: chosen.append(choose(*a, **k)) or chosen[-1]
        )
        for regime in floors.REGIMES:
            Regime(regime).bind(x, w, y, 2, 1.0).loss()
            assert regime_of(chosen[-1]) == regime
    assert regime_of(functional.plan(x, w, memory_budget=2**62)) == "row chunks"
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


def test_a_float16_loss_is_not_scaled_beyond_its_range():
    case = Case(2048, 8, 100, "float16", 2)  # log 100 times 32768 is beyond 65504
    rows = run(OURS, CrossEntropy(), case=case)
    assert [row["status"] for row in rows.values()] == ["ok", "ok"], rows


def test_the_forward_pass_without_gradients_is_checked_too():
    def wrong_without_gradients(x, w, y, margin, lam):
        loss = reference.lsoftmax_loss(x, w, y, margin, lam)
        return loss if torch.is_grad_enabled() else loss - 7

    rows = run(named("culprit", wrong_without_gradients))
    assert rows["culprit"]["status"] == "wrong numbers"
    assert rows["culprit"]["note"].startswith("loss off by")


@pytest.mark.parametrize(("part", "said"), [(0, "loss"), (1, "dx"), (2, "dw")])
def test_replays_are_checked(monkeypatch, part, said):
    """The first replay's outputs, here those of a capture that spoils one of the three."""

    class Spoiling(timing.Graphs):
        def capture(self, function):
            outputs = [output.detach().clone() for output in function()]
            index = part if len(outputs) == 1 else part - 1

            def replay():
                if 0 <= index < len(outputs):
                    outputs[index] += 1

            return replay, tuple(outputs)

    monkeypatch.setattr("benchmarks.run.Graphs", Spoiling)
    rows = run(OURS, PRODUCTS, graph=True)
    assert rows[OURS.name]["status"] == "wrong numbers"
    assert rows[OURS.name]["note"].startswith(f"as a graph: {said} off by")
    assert rows[PRODUCTS.name]["status"] == "ok"


def test_kernels_are_listed_of_what_was_timed(monkeypatch):
    listed = [{"name": "kernel", "calls": 3, "us": 1.0}, {"name": "copy", "calls": 2, "us": 0.5}]
    shapes = []

    def device_work(step):
        shapes.append([tuple(gradient.shape) for gradient in step()])
        return listed

    providers = [OURS, LinearCrossEntropy()]
    settings = settings_for(CPU)
    rows = list(run(*providers).values())
    gpu = torch.device("cuda")
    assert [to_list(row, providers, gpu) for row in rows] == [True, False], "one lists none"
    assert not to_list(rows[0], providers, CPU)
    assert not to_list(rows[0] | {"status": "failed"}, providers, gpu)
    assert not to_list(rows[0] | {"kernels": listed}, providers, gpu)
    monkeypatch.setattr("benchmarks.run.device_work", device_work)
    monkeypatch.setattr("benchmarks.run.to_list", lambda row, *_: row is rows[0])
    list_kernels(rows, CASE, providers, settings)
    assert rows[0]["kernels"] == listed
    assert rows[0]["launches"] == 5
    assert shapes == [[(CASE.n, CASE.d), (CASE.c, CASE.d)]]
    assert rows[1]["launches"] is None

    def failing(step):
        raise RuntimeError("a profiler that will not")

    rows[0] |= {"kernels": None, "launches": None}
    monkeypatch.setattr("benchmarks.run.device_work", failing)
    list_kernels(rows, CASE, providers, settings)
    assert (rows[0]["kernels"], rows[0]["launches"]) == ([], None), "not tried again for ever"
    assert rows[0]["forward_backward"]


def test_a_budget_is_kept_where_not_all_fits() -> None:
    class Small(Budgeted):
        bytes = 4 * 24 * 50

    rows = run(Small(), case=CASE)
    assert rows[Small.name]["status"] == "ok"
    assert rows[Small.name]["peak_bytes"] < 4 * CASE.n * CASE.c
    assert run(Budgeted(), case=CASE)[Budgeted.name]["note"] == "all of it fits"


@pytest.mark.parametrize("before", [None, "yes"])
def test_forward_apart_is_asked_for_by_its_calls_alone(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.delenv(SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(SWITCH, before)
    x = torch.ones((), requires_grad=True)
    x.register_hook(lambda grad: seen.append(os.environ[SWITCH]))

    def loss() -> torch.Tensor:
        seen.append(os.environ[SWITCH])
        return x * 2

    bound = BoundApart(loss, (x, x))
    bound.evaluate()
    bound.step()
    assert seen == ["0"] * 3, "forward twice, and backward"
    with pytest.raises(ZeroDivisionError):
        BoundApart(lambda: 1 / 0, (x, x)).step()
    assert os.environ.get(SWITCH) == before
