"""The harness's runs: their files, how they stop and go on, and the command line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import harness  # noqa: F401  (makes `import benchmarks` work)

pytest.importorskip("matplotlib", reason="the report's charts need matplotlib")
pytest.importorskip("tqdm", reason="the benchmarks need tqdm")
pytest.importorskip("jsonschema")

import jsonschema

from benchmarks import ROOT, machine, results, run
from benchmarks import __main__ as command
from benchmarks.cases import GPU_FIRST, standard_cases
from benchmarks.providers import OURS, PRODUCTS, REFERENCE, Function
from benchmarks.run import DeviceLostError
from lsoftmax import reference
from measuring import SHAPES, check, command_line


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict]:
    """A function that runs the command line on small shapes; its result comes back."""
    return partial(command_line, monkeypatch, tmp_path)


def keys(result: dict) -> list[tuple]:
    return [(*row["case"].values(), row["provider"]) for row in result["rows"]]


class Interrupting(Function):
    """Somebody presses Ctrl-C when it comes to the n-th case."""

    def __init__(self, case: int) -> None:
        super().__init__(REFERENCE.name, reference.lsoftmax_loss, arrays=5)
        self.left = 2 * case - 1  # it is bound twice a case

    def bind(self, *args):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().bind(*args)


# ---- files --------------------------------------------------------------------------------------


def test_the_device_measured_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events, streams and peaks of memory are the current one's, whatever --device says."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cpu", "cuda", "cuda:1"):
        assert command.device_with(torch.get_num_threads(), name) == torch.device(name)
    assert current == [torch.device("cuda:1")]


def test_committed_results_follow_the_schema():
    assert results.committed()
    for path in results.committed():
        check(results.load(path))


def test_a_run_follows_the_schema(quick):
    result = quick(REFERENCE)
    check(result)
    assert result["complete"]
    assert len(keys(result)) == len(set(keys(result))) == len(SHAPES) * 2 * 3
    assert result["command"].startswith("python -m benchmarks --device cpu --quick")
    assert result["machine"]["torch"] == torch.__version__
    broken = copy.deepcopy(result)
    broken["rows"][1]["forward"]["ms"] = "fast"
    with pytest.raises(jsonschema.ValidationError):
        check(broken)
    del result["rows"][0]["provider"]
    with pytest.raises(jsonschema.ValidationError):
        check(result)


def test_an_interrupted_run_goes_on_to_the_same_rows(quick, tmp_path):
    whole = quick(REFERENCE, output="whole.json")
    with pytest.raises(SystemExit, match=r"--resume .*part\.json"):
        quick(Interrupting(case=4), output="part.json")
    part = results.load(tmp_path / "part.json")
    check(part)
    assert not part["complete"]
    assert len(part["rows"]) == 3 * 3  # of the cases before, every provider
    resumed = quick(REFERENCE, resume="part.json")
    check(resumed)
    assert resumed["complete"]
    assert keys(resumed) == keys(whole)
    assert resumed["rows"][: len(part["rows"])] == part["rows"]  # not measured again
    again = quick(REFERENCE, resume="part.json")
    assert again == resumed
    assert list(tmp_path.glob(".*")) == []


def test_a_run_stopped_in_its_first_case_can_go_on(quick, tmp_path):
    with pytest.raises(SystemExit, match="To go on"):
        quick(Interrupting(case=1))
    check(results.load(tmp_path / "run.json"))
    assert quick(REFERENCE, resume="run.json")["complete"]


def test_a_run_goes_on_without_who_lost_the_device(quick, tmp_path, monkeypatch):
    def measure(case, *args):
        if case.n == 9 and case.c == 30 and REFERENCE.name not in args[-1]:
            raise DeviceLostError(REFERENCE.name, "an illegal memory access")
        return run.measure(case, *args)

    monkeypatch.setattr(command, "measure", measure)
    with pytest.raises(SystemExit, match=r"lost: reference: an illegal.*\n.*--resume .*run\.json"):
        quick(REFERENCE)
    check(results.load(tmp_path / "run.json"))
    with pytest.raises(SystemExit, match="lost"):  # with the other margin it is another case
        quick(REFERENCE, resume="run.json")
    result = quick(REFERENCE, resume="run.json")
    check(result)
    assert result["complete"]
    failed = [row for row in result["rows"] if row["status"] == "failed"]
    assert [(row["provider"], row["case"]["c"]) for row in failed] == [(REFERENCE.name, 30)] * 2
    assert {row["note"] for row in failed} == {"an illegal memory access"}


def test_kernels_are_listed_after_all_has_been_timed(quick, tmp_path, monkeypatch):
    """What lists them makes launches slower. Red too if an interrupted list is not gone on with."""
    timed = []
    stop = iter([False, False, True, *[False] * len(SHAPES) * 2])

    def list_kernels(rows, case, *args):
        timed.append(len(results.load(tmp_path / "run.json")["rows"]))
        if next(stop):
            raise KeyboardInterrupt
        for row in rows:
            row["kernels"], row["launches"] = [], 0

    monkeypatch.setattr(command, "to_list", lambda row, *_: row["kernels"] is None)
    monkeypatch.setattr(command, "list_kernels", list_kernels)
    with pytest.raises(SystemExit, match="To go on"):
        quick(REFERENCE)
    assert not results.load(tmp_path / "run.json")["complete"]
    assert len(timed) == 3
    result = quick(REFERENCE, resume="run.json")
    check(result)
    assert {row["launches"] for row in result["rows"]} == {0}
    assert timed == [len(result["rows"])] * (len(SHAPES) * 2 + 1), "all; the third case twice"


def test_a_case_that_lacks_a_row_is_measured_again(quick, tmp_path):
    result = quick()
    missing = keys(result)[2]
    del result["rows"][2]  # one of the second case's two
    result["complete"] = False
    path = tmp_path / "run.json"
    results.write(path, result)
    assert sorted(keys(quick(resume="run.json"))) == sorted([*keys(result), missing])


def test_a_run_does_not_go_on_elsewhere(quick, tmp_path):
    result = quick()
    result["machine"]["torch"] = "1.0"
    del result["machine"]["environment"]  # as in files of before there was one
    results.write(tmp_path / "run.json", result)
    with pytest.raises(SystemExit, match=r"torch: 1\.0, now"):
        quick(resume="run.json")
    assert machine.same_machine(result["machine"], result["machine"]) == []


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "run.json"
    results.write(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        results.write(path, {"a": float("nan")})
    assert results.load(path) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


# ---- command line -------------------------------------------------------------------------------


def test_list_names_every_provider_and_what_is_missing(capsys, monkeypatch):
    class Missing(Function):
        requires, package = "surely_no_such_module", "no-such-package"

    missing = Missing("missing", reference.lsoftmax_loss, 1)
    monkeypatch.setattr(command, "PROVIDERS", [OURS, missing])
    command.main(["--list", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "missing  (not installed: pip install no-such-package)" in said
    assert "(256, 512, 10000) float32 m=4" in said


def test_no_result_is_written_over(quick, tmp_path, capsys):
    before = quick()
    with pytest.raises(SystemExit):
        quick()
    assert "run.json: is there already" in capsys.readouterr().err
    assert results.load(tmp_path / "run.json") == before
    path = command.new_file(before["machine"])
    assert path.parent == ROOT / "build" / "benchmarks"
    assert path.name.startswith("cpu-20")
    gpu = before["machine"] | {"gpu": {"name": "NVIDIA H200"}, "date": "2026-11-29T01:02:03+00:00"}
    assert command.new_file(gpu).name == "nvidia-h200-20261129010203.json"


def test_a_quick_run_begins_with_what_there_are_figures_to_reach_for():
    quick, full = (standard_cases("cuda", quick) for quick in (True, False))
    first = [case.shape for case in quick[:3]]
    assert set(first) == set(GPU_FIRST)
    assert [case.shape for case in full[:2]] == [(512, 2, 10)] * 2
    assert set(quick) <= set(full)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--providers", "nobody"], "no provider has 'nobody' in its name"),
        (["--shapes", "3,4"], "invalid shape value"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--graph", "--device", "cpu"], "needs --device cuda"),
    ],
)
def test_bad_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err


def test_choices_reach_the_run():
    args = ["--device", "cpu", "--providers", "ours", "--passes", "forward", "--types", "bfloat16"]
    settings = command.settings_of(command.parse([*args, "--shapes", "2,3,4", "--cold"]))
    assert settings.providers[:2] == [PRODUCTS.name, OURS.name]
    assert REFERENCE.name not in settings.providers
    assert settings.passes == ["forward"]
    assert settings.cold
    assert [(c["dtype"], c["margin"]) for c in settings.cases] == [("bfloat16", 4), ("bfloat16", 1)]
