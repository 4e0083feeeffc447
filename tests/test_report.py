"""docs/experiments.md is what the committed results say."""
# ruff: noqa: E402

from __future__ import annotations

import json

import pytest

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the examples need {package}")

import report

PAGE = report.DOCS / "experiments.md"


def test_page_is_made_from_the_results():
    """Red if a result was replaced, or the page edited, without `python examples/report.py`."""
    results = report.load()
    assert results, "examples/results holds none"
    page = PAGE.read_text()
    assert report.fill(page, results) == page
    for key, _ in report.measured_parts(results):
        assert (report.DOCS / f"experiments-{key}.png").exists()
    readme = (report.ROOT / "README.md").read_text()
    assert readme.count("<!-- experiments -->") == 1
    assert report.fill_readme(readme, results) == readme


def test_without_results_the_page_says_so():
    blank = report.fill(PAGE.read_text(), {})
    assert "softmax |" not in blank
    assert blank.count("Not measured yet.") == blank.count("<!-- end -->") >= 3
    assert report.fill(blank, report.load()) == PAGE.read_text()


def results_of(*errors: tuple[int, int, float]) -> dict:
    rows = [
        {
            "margin": m, "seed": s, "test_error": e, "angle": 10.0, "other_angle": 80.0,
            "warning": None if e < 9 else "Training is collapsing",
        }
        for m, s, e in errors
    ]  # fmt: skip
    settings = {"epochs": 10, "lr": 0.1, "drops": [], "amp": False}
    return {"settings": settings, "versions": {"torch": "9.9"}, "rows": rows}


def test_block():
    results = results_of((1, 0, 1.0), (4, 0, 0.5), (1, 1, 2.0), (4, 1, 9.5))
    lines = report.block(report.PARTS["mnist"], results).splitlines()
    assert lines[2] == "| softmax | 1.50 ± 0.71 | 10.00 ± 0.00 | 80.00 ± 0.00 | 0.40 |"
    assert lines[3] == "| L-Softmax, m = 4 | 5.00 ± 6.36 | 10.00 ± 0.00 | 80.00 ± 0.00 | 0.31 |"
    assert lines[5] == "Seeds: 2; epochs 10, lr 0.1; torch 9.9."
    assert lines[6].startswith("1 of 4 trainings ended with a warning")


def test_a_column_that_only_some_rows_have():
    """Rows older than the column have nothing in it; where all are, it is left out."""
    results = results_of((1, 0, 1.0), (4, 0, 0.5))
    assert "answered" not in report.block(report.PARTS["mnist"], results)
    results["rows"][1]["unanswered"] = 3
    lines = report.block(report.PARTS["mnist"], results).splitlines()
    assert lines[0].endswith("| classes never answered | the paper's, % |")
    assert lines[2] == "| softmax | 1.00 | 10.00 | 80.00 |  | 0.40 |"
    assert lines[3] == "| L-Softmax, m = 4 | 0.50 | 10.00 | 80.00 | 3.00 | 0.31 |"


def test_comparison_of_what_was_trained_otherwise_too():
    """A line each way, under the margins; only of what was trained every way."""
    keep = report.VARIANTS["keep"]
    results = {
        "mnist": results_of((1, 0, 1.0), (1, 1, 9.0), (4, 0, 0.5), (3, 0, 0.25)),
        "mnist-keep0.7": results_of((1, 0, 2.0), (2, 0, 0.75), (4, 0, 0.5)),
        "cifar10": results_of((1, 0, 3.0)),
    }
    assert report.compared(results, keep).splitlines()[2:] == [
        "| mnist: test error, % | 1.00 |  |  | 0.50 |",
        "| *keep=0.7* | 2.00 |  |  | 0.50 |",
        "| mnist: angle to the own class, degrees | 10.00 |  |  | 10.00 |",
        "| *keep=0.7* | 10.00 |  |  | 10.00 |",
    ]
    sampled = {
        "mnist": results["mnist"],
        "mnist-sample0.5": results_of((1, 1, 2.0), (4, 0, 0.75), (3, 0, 4.0)),
        "mnist-sample0.2": results_of((1, 1, 3.0), (4, 0, 1.5), (2, 0, 4.0)),
    }
    assert report.compared(sampled, report.VARIANTS["sampled"]).splitlines()[2:5] == [
        "| mnist: test error, % | 9.00 |  |  | 0.50 |",
        "| *half of the classes a step* | 2.00 |  |  | 0.75 |",
        "| *a fifth* | 3.00 |  |  | 1.50 |",
    ]
    for row in (row for kind in ("mnist", "mnist-keep0.7") for row in results[kind]["rows"]):
        row["fold"] = row["margin"]
    assert "| mnist (2 of 10 folds): test error, % |" in report.compared(results, keep)


def test_a_page_without_a_place_for_results_is_an_error():
    with pytest.raises(SystemExit, match="mnist"):
        report.fill("# Experiments\n", {"mnist": results_of((1, 0, 1.0))})


def test_main_writes_page_and_pictures(tmp_path, monkeypatch):
    folder, docs = tmp_path / "results", tmp_path / "docs"
    folder.mkdir()
    docs.mkdir()
    results = results_of((1, 0, 1.0))
    results["rows"][0]["angle_counts"] = {"own": [1, 2, 3], "other": [0, 1, 5]}
    (folder / "mnist.json").write_text(json.dumps(results))
    (docs / "experiments.md").write_text("a\n<!-- mnist -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr(report, "RESULTS", folder)
    monkeypatch.setattr(report, "DOCS", docs)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("c\n<!-- experiments -->\n<!-- end -->\n")
    report.main([])
    page = (docs / "experiments.md").read_text()
    assert page.startswith("a\n<!-- mnist -->\n| | test error")
    assert page.endswith("<!-- end -->\nb\n")
    assert "old" not in page
    assert "| mnist: test error, % | 1.00" in (tmp_path / "README.md").read_text()
    assert (docs / "experiments-mnist.png").stat().st_size > 5000
