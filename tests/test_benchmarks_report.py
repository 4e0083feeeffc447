"""The harness's files: their schema, runs that stop and go on, and the report made of them."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch

import harness  # noqa: F401  (makes `import benchmarks` work)

pytest.importorskip("matplotlib", reason="the report's charts need matplotlib")
pytest.importorskip("tqdm", reason="the benchmarks need tqdm")
jsonschema = pytest.importorskip("jsonschema")

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import charts, machine, report, results, tables  # noqa: E402
from benchmarks.providers import OURS, PRODUCTS, REFERENCE, Function  # noqa: E402
from lsoftmax import reference  # noqa: E402

SHAPES = ["9,4,12", "9,4,30", "9,4,80", "5,4,30", "20,4,30"]
FILES = results.committed()


def check(result: dict) -> None:
    schema = json.loads(results.SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(result, schema)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A function that runs the command line on small shapes; its result comes back."""

    def measure(*providers: Function, output: str = "run.json", resume: str = "") -> dict:
        monkeypatch.setattr(command, "PROVIDERS", [PRODUCTS, OURS, *providers])
        path = tmp_path / (resume or output)
        new = [
            "--device",
            "cpu",
            "--quick",
            "--output",
            str(path),
            "--rounds",
            "1",
            "--threads",
            "1",
        ]
        new += ["--seconds", "1e-3", "--shapes", *SHAPES, "--margins", "3", "1"]
        command.main(["--resume", str(path)] if resume else new)
        return results.load(path)

    limits = {"bandwidth": 1e10, "flops": {"float32": 1e11}}
    monkeypatch.setattr(command, "measure_limits", lambda device, types: limits)
    threads = torch.get_num_threads()
    yield measure
    torch.set_num_threads(threads)


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
    assert FILES
    for path in FILES:
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


# ---- report -------------------------------------------------------------------------------------


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
