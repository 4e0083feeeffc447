"""What the harness says of providers that fail, run out of memory or lose the device."""

from __future__ import annotations

import pytest
import torch

import harness  # noqa: F401  (makes `import benchmarks` work)
from benchmarks.peers import CrossEntropy
from benchmarks.providers import OURS
from benchmarks.run import DeviceLostError
from benchmarks.tables import ranked
from lsoftmax import reference
from measuring import named, run

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("when", ["checked", "timed"])
def test_a_device_that_is_lost_ends_the_run_with_the_name_of_who_lost_it(monkeypatch, when):
    """After such an error all that follows fails; the next run passes over the culprit."""
    calls, is_lost = iter(range(10**6)), []
    lost_from = {"checked": 0, "timed": 6}[when]

    def innocent(x, w, y, margin, lam):
        if is_lost:
            raise RuntimeError("the device is gone")
        return reference.lsoftmax_loss(x, w, y, margin, lam)

    def culprit(x, w, y, margin, lam):
        if next(calls) >= lost_from:
            is_lost.append(True)
            raise RuntimeError("an illegal memory access")
        return innocent(x, w, y, margin, lam)

    def look_at(device, row):  # as on a GPU
        raise DeviceLostError(row["provider"], row["note"])

    monkeypatch.setattr("benchmarks.run.look_at", look_at)
    with pytest.raises(DeviceLostError, match="culprit: an illegal memory access") as lost:
        run(named("innocent", innocent), named("culprit", culprit), OURS)
    assert (lost.value.provider, lost.value.note) == ("culprit", "an illegal memory access")
    rows = run(named("culprit", culprit), OURS, lost={"culprit": "an illegal memory access"})
    assert rows["culprit"]["status"] == "failed"
    assert rows["culprit"]["note"] == "an illegal memory access"
    assert rows[OURS.name]["status"] == "ok"
