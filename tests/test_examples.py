"""examples/digits.py, run as `make demo` runs it, only shorter."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lsoftmax

pytest.importorskip("sklearn", reason="the example needs scikit-learn")
pytest.importorskip("matplotlib", reason="the example needs matplotlib")
pytest.importorskip("tqdm", reason="the example needs tqdm")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "digits.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load()


@pytest.fixture(autouse=True)
def _one_thread():
    """As main() sets it: two threads on so small a network mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_table_picture_and_figures(digits, device, tmp_path, capsys):
    # Red if a margin is missing, the picture is not written whole, or a run yields NaN.
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    picture, figures = tmp_path / "new" / "digits.png", tmp_path / "digits.json"
    output = ["--output", str(picture), "--json", str(figures)]
    results = digits.main(["--device", device, "--epochs", "1", "--seeds", "2", *output])

    printed = capsys.readouterr().out
    kernels = device == "cuda" and lsoftmax.cuda_available()
    assert ("CUDA kernels" if kernels else "plain PyTorch") in printed.splitlines()[0]
    for row in ("softmax  ", "L-Softmax, m = 2", "L-Softmax, m = 3", "L-Softmax, m = 4"):
        (line,) = [line for line in printed.splitlines() if line.startswith(row)]
        assert line.count("±") == 2, "error and angle, each with its spread over two seeds"
    assert str(picture) in printed

    pixels = imread(picture)[..., :3]
    height, width, _ = pixels.shape
    assert width > 3 * height, "four panels in a row"
    for colour in digits.COLOURS:
        exact = torch.tensor(to_rgb(colour))
        assert ((torch.from_numpy(pixels) - exact).abs() < 0.01).all(-1).any(), f"no {colour}"

    rows = json.loads(figures.read_text())
    assert [(row["margin"], row["seed"]) for row in rows] == [
        (margin, seed) for seed in (0, 1) for margin in (1, 2, 3, 4)
    ]
    for row, result in zip(rows, results, strict=True):
        assert row["test_error"] == result.test_error
        assert 0 <= row["test_error"] <= 100
        assert 0 < row["angle"] < 180
        assert math.isfinite(row["seconds"])
    assert sorted(tmp_path.rglob("*.*")) == [figures, picture], "a temporary file was left"


def test_same_seed_same_numbers(digits, device, tmp_path):
    # Red if anything random in a run does not come from its seed.
    def figures(*margins: int) -> dict[tuple[int, int], tuple[float, float]]:
        options = ["--device", device, "--epochs", "1", "--seeds", "2", "--margins"]
        output = ["--output", str(tmp_path / "digits.png")]
        results = digits.main([*options, *map(str, margins), *output])
        return {(r.margin, r.seed): (r.test_error, r.angle) for r in results}

    both = figures(1, 3)
    assert both == figures(3, 1), "what ran before must not matter"
    assert both[3, 0] != both[3, 1], "the seed must matter"


def test_comparison_is_fair(digits, monkeypatch):
    # As lam grows every margin is softmax: then all must train alike. Red if initial weights or the
    # order of the data depend on the margin.
    monkeypatch.setattr(
        digits, "annealing", lambda steps: lsoftmax.LambdaSchedule(1e12, 0.0, 0.0, 0.0)
    )
    data = digits.load_data(torch.device("cpu"))
    softmax, margin = (digits.run(data, m, 5, 1, lambda: None) for m in (1, 4))
    torch.testing.assert_close(margin.features, softmax.features, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(margin.class_vectors, softmax.class_vectors, rtol=1e-3, atol=1e-3)


def test_margin_narrows_the_angle_and_loses_no_class(digits):
    # Over 20 seeds the angle fell to 0.44 to 0.81 of softmax's, and no error was above 5%. Red if
    # the schedule does not advance (m = 4 is then softmax: ratio 1), if psi or its gradient is
    # wrong, or if the margin sets in too early (a lost class: an error of 10% and more).
    data = digits.load_data(torch.device("cpu"))
    softmax, margin = (
        [digits.run(data, m, seed, 30, lambda: None) for seed in (0, 1)] for m in (1, 4)
    )
    assert sum(r.angle for r in margin) < 0.85 * sum(r.angle for r in softmax)
    assert max(r.test_error for r in softmax + margin) < 8


def test_angles_are_degrees_to_the_own_class(digits):
    features = torch.tensor([[3.0, 0.0], [0.0, 0.5], [-2.0, 0.0], [1.0, 1.0]])
    class_vectors = torch.tensor([[0.0, 9.0], [2.0, 0.0]])
    degrees = digits.angles(features, class_vectors, torch.tensor([1, 1, 1, 0]))
    torch.testing.assert_close(degrees, torch.tensor([0.0, 90.0, 180.0, 45.0]), atol=0.05, rtol=0)


def test_picture_shows_the_typical_seed(digits):
    # Red if the picture is picked by anything but closeness to the table.
    angles = {0: (4.0, 3.0), 1: (5.1, 2.9), 2: (6.0, 1.0)}  # means 5.03 and 2.3
    none = torch.empty(0, 2)
    results = [
        digits.Result(margin, seed, 0.0, angle, 0.0, none, none)
        for seed, pair in angles.items()
        for margin, angle in zip((1, 4), pair, strict=True)
    ]
    assert digits.typical(results) == results[2:4]


def test_annealing_ends_at_its_floor(digits):
    # Red if the schedule no longer follows the length of the training.
    for steps in (20, 600, 50_000):
        schedule = digits.annealing(steps)
        assert schedule.value(0) == 1000
        assert schedule.value(steps // 3) > 2
        assert schedule.value(round(0.75 * steps)) == schedule.minimum < 1


def test_write_is_whole_or_not_at_all(digits, tmp_path, monkeypatch):
    path = tmp_path / "digits.png"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(digits.os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            digits.write(path, b"new")
    assert path.read_bytes() == b"old"
    digits.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "tqdm"])
def test_missing_package_is_named(package, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # import now fails as if it were not installed
    with pytest.raises(SystemExit, match=rf'{package}.*pip install "lsoftmax\[examples\]"'):
        load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--margins", "1", "two"], "--margins"),
        (["--device", "abacus"], "--device abacus"),
        (["--output", "."], "is a directory"),
    ],
)
def test_bad_options_are_refused_before_training(digits, options, message, capsys):
    with pytest.raises(SystemExit):
        digits.main(options)
    assert message in capsys.readouterr().err
