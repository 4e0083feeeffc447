"""The report that the harness makes of its files, and of nothing else."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import harness  # noqa: F401  (makes `import benchmarks` work)

pytest.importorskip("matplotlib", reason="the report's charts need matplotlib")
pytest.importorskip("tqdm", reason="the benchmarks need tqdm")
pytest.importorskip("jsonschema")

from benchmarks import __main__ as command
from benchmarks import charts, report, results, tables
from benchmarks.providers import OURS, REFERENCE, Function
from lsoftmax import reference
from measuring import check, command_line

FILES = results.committed()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict]:
    """A function that runs the command line on small shapes; its result comes back."""
    return partial(command_line, monkeypatch, tmp_path)


def test_readme_and_report_are_what_the_files_say():
    runs = {path.name: results.load(path) for path in FILES}
    readme = report.README.read_text()
    assert report.with_section(readme, report.section(runs)) == readme
    assert (results.RESULTS / "README.md").read_text() == report.full(runs)
    for name, result in runs.items():
        for chart in charts.available(result):
            assert (results.RESULTS / report.picture(name, chart)).exists()


def test_a_changed_figure_changes_the_readme(quick):
    runs = {"run.json": quick(REFERENCE)}
    standard = runs["run.json"]
    for row in [*standard["rows"], *({"case": c} for c in standard["settings"]["cases"])]:
        if (row["case"]["n"], row["case"]["c"]) == (9, 80):
            row["case"] |= {"n": 256, "d": 512, "c": 10}
    before = report.section(runs)
    assert "| 256, 512, 10 | float32 |" in before
    row = next(
        row
        for row in standard["rows"]
        if row["provider"] == OURS.name and row["case"]["n"] == 256 and row["case"]["margin"] == 3
    )
    row["forward_backward"]["ms"] = 123.0
    after = report.section(runs)
    assert "| 123 (" in after
    assert before != after
    with pytest.raises(ValueError, match="expected the lines"):
        report.with_section("no markers", after)
    page = f"top\n{report.BEGIN}\nold\n{report.END}\nbottom\n"
    assert report.with_section(page, "new") == f"top\n{report.BEGIN}\n\nnew\n{report.END}\nbottom\n"


def test_it_says_where_no_gpu_was_measured(quick):
    result = quick()
    assert report.NO_GPU in report.section({"run.json": result})
    assert report.NO_GPU in report.full({"run.json": result})
    gpu = copy.deepcopy(result)
    gpu["machine"]["gpu"] = {"name": "GPU", "memory": 1, "multiprocessors": 1, "driver": None}
    gpu["machine"]["cuda"] = "13.0"
    gpu["limits"]["flops"]["bfloat16"] = 1e14
    check(gpu)
    text = report.full({"run.json": result, "gpu.json": gpu})
    assert report.NO_GPU not in text
    assert "least, us" in text


def test_rows_without_a_rank_say_why(quick):
    def wrong(x, w, y, margin, lam):
        return 2 * reference.lsoftmax_loss(x, w, y, margin, lam)

    result = quick(Function("wrong", wrong, 1))
    rows = result["rows"][:3]
    lines = tables.case_table(rows).splitlines()
    (line,) = (line for line in lines if "| wrong |" in line)
    assert line.startswith("|  | wrong |")
    assert "**wrong numbers**: loss off by 1 (bound 0.0001)" in line
    assert any(line.startswith("| 1 | ours |") for line in lines)


@pytest.mark.parametrize("status", ["out of memory", "wrong numbers"])
def test_ours_is_marked_and_compared_with_nothing_where_it_does_not_count(quick, status):
    """As others are: red if the time of a forward pass stands for one with backward."""
    result = quick(Function(tables.PLAIN, reference.lsoftmax_loss, 1))
    for row in [*result["rows"], *({"case": c} for c in result["settings"]["cases"])]:
        if (row["case"]["n"], row["case"]["c"]) == (9, 80):
            row["case"] |= {"n": 256, "d": 512, "c": 10}
    ours = next(
        row
        for row in result["rows"]
        if row["provider"] == OURS.name and row["case"]["n"] == 256 and row["case"]["margin"] == 3
    )
    ours["status"] = status
    if status == "out of memory":
        ours["forward_backward"] = None
    line = tables.overview(result).splitlines()[2].split(" | ")
    shown = tables.figures(ours["forward"]["ms"])
    assert line[2] == {"out of memory": status}.get(status, line[2])
    assert status == "out of memory" or line[2].startswith("(")
    assert shown not in line
    assert line[8] == tables.NONE


def test_few_samples_are_counted():
    time = {"ms": 2.0, "ms_20": 1.5, "ms_80": 2.5, "samples": 5}
    assert tables.spread(time) == "2 (1.5 to 2.5)"
    assert tables.spread(time | {"samples": 4}) == "2 (1.5 to 2.5, of 4)"
    assert tables.spread(time | {"samples": 1}) == "2 (of 1)"
    assert tables.spread(None) == tables.NONE


def test_what_a_run_left_out_is_said(quick):
    result = quick()
    assert report.how_far(result) == " (quick, without what is compiled)"
    result["complete"] = False
    result["settings"] |= {"quick": False, "deviation": 30.0}
    result["settings"]["providers"].append("F.cross_entropy, compiled")
    assert report.how_far(result) == " (interrupted)"
    result["machine"]["environment"] = {"LSOFTMAX_FUSED_FORWARD": "0"}
    said = report.facts("run.json", result)
    assert "LSOFTMAX_FUSED_FORWARD=0; load" in said
    assert "logits' deviation 30" in said


def test_charts(quick):
    from matplotlib.image import imread

    result = quick(REFERENCE)
    drawn = charts.available(result)
    assert [chart.name for chart in drawn] == ["times", "roofline", "memory", "cost"]
    assert {axis: len(cases) for axis, cases in charts.both_series(result).items()} == {
        "c": 3,
        "n": 3,
    }
    for chart in drawn:
        picture = imread(io.BytesIO(chart.draw(result)))
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.02  # not a blank page
    result["rows"] = []
    assert charts.available(result) == []


def test_report_of_other_files_leaves_the_readme_alone(quick, tmp_path):
    quick(REFERENCE)
    before = report.README.read_text()
    command.main(["report", str(tmp_path / "run.json"), "--output", str(tmp_path / "out")])
    assert report.README.read_text() == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", *(f"run-{c.name}.png" for c in charts.CHARTS)}
    for name in names - {"README.md"}:
        assert f"({name})" in (tmp_path / "out" / "README.md").read_text()
