"""The examples' experiments, end to end on small synthetic data."""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the examples need {package}")

import cifar
import classification
import experiment
import lfw
import lsoftmax
import mnist
import omniglot
import pairs as pairs_module
from data import MNIST_FILES
from test_data import idx, write_pickles

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def write_mnist(folder: Path, count: int = 256) -> None:
    """Ten classes that can be told apart, in MNIST's files."""
    rng = np.random.default_rng(0)
    shapes = rng.integers(0, 200, (10, 28, 28))
    for part in ("train", "t10k"):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        noise = rng.integers(0, 56, (count, 28, 28))
        images = (shapes[labels] + noise).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            (folder / f"{name}-ubyte").write_bytes(idx(array))
    assert all((folder / name).exists() for name in MNIST_FILES)


def check_pictures(folder: Path, *names: str) -> None:
    from matplotlib.image import imread

    for name in names:
        assert imread(folder / name)[..., :3].std() > 0.02, f"{name} is blank"
    assert {path.name for path in folder.iterdir()} == {"results.json", *names}


def test_mnist_killed_and_resumed(tmp_path):
    """Killed as a machine going down kills, and run again: the same table as without. Red if rows
    are lost or doubled, or the run in progress does not end as it would have.
    """
    write_mnist(tmp_path)
    options = ["--data", str(tmp_path), "--seeds", "2", "--margins", "1", "4", "--epochs", "3"]
    options += ["--device", "cpu"]
    killed = tmp_path / "killed"
    code = (
        "import os, sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
        "import mnist, training\n"
        "seen, original = [], training.save\n"
        "def save(*args):\n"
        "    original(*args); seen.append(1)\n"
        "    if len(seen) == 8: os._exit(9)\n"
        "training.save = save\n"
        "mnist.main(sys.argv[2:])\n"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES), *options, "--output", str(killed)]
    path = os.pathsep.join([str(Path(lsoftmax.__file__).parents[1]), *sys.path])
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert run.returncode == 9, run.stderr.decode()
    assert len(json.loads((killed / "results.json").read_text())["rows"]) == 2
    assert (killed / "margin1-seed1.pt").exists()

    def rows(folder: Path) -> list[dict]:
        rows = mnist.main([*options, "--output", str(folder)])
        assert rows == json.loads((folder / "results.json").read_text())["rows"]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    resumed, straight = rows(killed), rows(tmp_path / "straight")
    assert resumed == straight
    assert [(row["margin"], row["seed"]) for row in straight] == [(1, 0), (4, 0), (1, 1), (4, 1)]
    assert all(row["test_error"] < 20 for row in straight)
    check_pictures(killed, "angles.png", "training.png")


def test_cifar(device, tmp_path, capsys):
    rng = np.random.default_rng(0)
    batches = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        labels = rng.integers(0, 10, 30)
        batches[name] = rng.integers(0, 256, (30, 3, 32, 32)).astype(np.uint8), labels
    write_pickles(tmp_path / "cifar-10-batches-py", batches, 10)
    output = tmp_path / "out"
    options = ["--data", str(tmp_path), "--recipe", "small", "--augment", "--epochs", "1"]
    options += ["--seeds", "1", "--device", device, "--output", str(output)]
    rows = cifar.main(options)
    assert [row["margin"] for row in rows] == [1, 2, 3, 4]
    settings = json.loads((output / "results.json").read_text())["settings"]
    assert settings["augment"] is True
    assert settings["train"] == 150
    assert "| L-Softmax, m = 3 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        cifar.main([option for option in options if option != "--augment"])


def test_error_of_rare_classes():
    """Of their own images: two of class 1, one of which is taken for class 2."""
    features = torch.eye(3)[[0, 0, 1, 2, 2]]
    labels = torch.tensor([0, 0, 1, 1, 2])
    figures = [
        classification.measure(features, torch.eye(3), labels, torch.tensor(rare).long())
        for rare in ([1], [2], [1, 2], [])
    ]
    assert [row.get("rare_error") for row in figures] == pytest.approx([50, 0, 100 / 3, None])
    assert all(row["test_error"] == pytest.approx(20) for row in figures)


@pytest.mark.parametrize("balance", ["weights", "deferred", "batches"])
def test_long_tailed_cifar(device, tmp_path, balance, monkeypatch, capsys):
    """Red if the options are not what is trained with and told, or if other classes are rare."""
    rare = []
    measure = classification.measure
    monkeypatch.setattr(
        classification, "measure", lambda *args: rare.append(args[3].tolist()) or measure(*args)
    )
    rng = np.random.default_rng(0)
    labels = np.arange(10).repeat(25)
    batches = {
        name: (rng.integers(0, 256, (250, 3, 32, 32)).astype(np.uint8), labels)
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    }
    write_pickles(tmp_path / "cifar-10-batches-py", batches, 10)
    output = tmp_path / "out"
    options = ["--data", str(tmp_path), "--recipe", "small", "--epochs", "1", "--seeds", "1"]
    options += ["--margins", "4", "--device", device, "--output", str(output), "--clip", "5"]
    (row,) = cifar.main([*options, "--long-tail", "12.5", "--balance", balance])
    settings = json.loads((output / "results.json").read_text())["settings"]
    assert {key: settings[key] for key in ("clip", "balance", "long_tail", "train")} == {
        "clip": 5.0,
        "balance": balance,
        "long_tail": 12.5,
        "train": sum(int(125 * 12.5 ** (-c / 9)) for c in range(10)),
    }
    assert rare == [[7, 8, 9]]  # of 17, 13 and 10 images
    assert 0 <= row["rare_error"] <= 100
    assert "classes of fewer than 20 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cifar.main([*options, "--long-tail", "126"])
    assert "expected a ratio of at most 125" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--clip", "0"), ("--long-tail", "0.5"), ("--balance", "none")], ids=str
)
def test_a_bad_option_is_named(option, capsys):
    with pytest.raises(SystemExit):
        cifar.main([*option])
    assert f"argument {option[0]}" in capsys.readouterr().err


def write_omniglot(folder: Path) -> None:
    """Ten characters, each with a shape of its own, of 20 drawings; pairs in two folds."""
    rng = np.random.default_rng(0)
    shapes = rng.random((14, 1, 35, 35)) < 0.75
    drawings = (shapes ^ (rng.random((14, 20, 35, 35)) < 0.05)).repeat(3, 2).repeat(3, 3)
    np.savez(folder / "images_background.npz", images=drawings[:10])
    rows = []
    for fold in range(2):
        for character in range(4):
            for other in (character, (character + 1) % 4):
                rows += [(fold, other == character, character, i, other, i + 1) for i in range(8)]
    rows = np.array(rows, np.int16)
    np.savez(folder / "omniglot_eval_dev.npz", images=drawings[10:], pairs=rows)


def test_omniglot(device, tmp_path, capsys):
    """Unseen characters whose drawings are alike: most pairs are told apart after a few steps."""
    write_omniglot(tmp_path)
    output = tmp_path / "out"
    options = ["--data", str(tmp_path), "--margins", "1", "3", "--seeds", "1", "--epochs", "4"]
    options += ["--keep", "0.25", "--by-class"]
    rows = omniglot.main([*options, "--device", device, "--output", str(output)])
    assert [row["identities"] for row in rows] == [10, 10]
    assert all(row["accuracy"] > 80 and row["eer"] < 25 for row in rows)
    check_pictures(output, "roc.png", "training.png")
    assert "Ten folds" in capsys.readouterr().out
    settings = json.loads((output / "results.json").read_text())["settings"]
    schedule = lsoftmax.LambdaSchedule.for_steps(4, keep=0.25, num_classes=10)
    assert settings["schedule"] == schedule.extra_repr()


def test_lfw(device, tmp_path, monkeypatch, capsys):
    """Each fold by a training without its people."""
    generator = torch.Generator().manual_seed(0)
    people = torch.arange(40).repeat_interleave(8)
    faces = torch.randint(0, 200, (40, 1, 16, 16), generator=generator)[people]
    faces = (faces + torch.randint(0, 56, faces.shape, generator=generator)).to(torch.uint8)
    rows = [
        (8 * p + i, 8 * (p + other) + i + 1, other == 0, p // 4)
        for p in range(39)
        for i in range(3)
        for other in (0, 1)
        if p % 4 < 3 and p < 38
    ]
    columns = torch.tensor(rows).T
    pairs = pairs_module.Pairs(columns[0], columns[1], columns[2].bool(), columns[3])
    known = pairs_module.Verification(faces, people, faces, people, pairs)
    monkeypatch.setattr(lfw, "lfw", lambda folder: known)
    options = ["--margins", "1", "2", "--seeds", "1", "--folds", "2", "--epochs", "2", "--by-class"]
    output = tmp_path / "out"
    rows = lfw.main([*options, "--device", device, "--output", str(output)])
    assert [(row["fold"], row["margin"], row["identities"]) for row in rows] == [
        (0, 1, 36),
        (0, 2, 36),
        (1, 1, 36),
        (1, 2, 36),
    ]
    assert all(50 <= row["accuracy"] <= 100 for row in rows)
    printed = capsys.readouterr().out
    assert "Folds: 2 of 10" in printed
    assert "FAR" not in printed, "nine pairs tell no accept rate of 1%"
    check_pictures(output, "roc.png", "training.png")
    settings = json.loads((output / "results.json").read_text())["settings"]
    assert settings["train"] == "288 to 296"  # the tenth fold has three people
    schedules = [
        lsoftmax.LambdaSchedule.for_steps(2 * (images // 128), num_classes=classes).extra_repr()
        for images, classes in ((288, 36), (296, 37))
    ]
    assert settings["schedule"] == " to ".join(schedules)
    with pytest.raises(SystemExit, match="other settings"):
        lfw.main([*options, "--least", "3", "--output", str(output)])
    with pytest.raises(SystemExit, match="--least 9: nobody"):
        lfw.main([*options, "--least", "9", "--output", str(output)])


def test_keep_of_the_authors_curve():
    given = {"epochs": None, "clip": None, "balance": None}
    for by_class, counted in ((False, {}), (True, {"num_classes": 10})):
        args = argparse.Namespace(keep=0.25, by_class=by_class, **given)
        schedule = experiment.chosen(cifar.PAPER[False], args).annealing(50_000, 10)
        expected = lsoftmax.LambdaSchedule(1000.0, 2e-5, 45.0, keep=0.25, **counted)
        assert schedule.extra_repr() == expected.extra_repr()
    args.keep = None
    with pytest.raises(SystemExit, match="--by-class: the authors' schedule goes by no angle"):
        experiment.chosen(cifar.PAPER[False], args)


@pytest.mark.parametrize("keep", ["1", "-0.1", "half"])
def test_keep_is_checked(keep, capsys):
    with pytest.raises(SystemExit):
        mnist.main(["--keep", keep])
    assert "argument --keep" in capsys.readouterr().err


@pytest.mark.parametrize("main", [mnist.main, cifar.main, omniglot.main, lfw.main])
def test_missing_data_ends_with_what_is_expected(main, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "expected in" in error
    assert "Usually found at" in error
    assert not (tmp_path / "out").exists()
