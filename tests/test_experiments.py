"""The examples' experiments, end to end on small synthetic data, and what they measure."""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the examples need {package}")

import cifar
import classification
import experiment
import lfw
import lsoftmax
import mnist
import networks
import omniglot
import pairs as pairs_module
import recognition
import verification
from data import MNIST_FILES
from test_data import idx, write_pickles

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- measures -----------------------------------------------------------------------------------


def test_measure_against_known_angles():
    features = torch.tensor([[3.0, 0.0], [0.0, 0.5], [-2.0, 0.0], [1.0, 1.0]])
    class_vectors = torch.tensor([[0.0, 9.0], [2.0, 0.0]])
    row = classification.measure(features, class_vectors, torch.tensor([1, 1, 1, 0]))
    assert row["angle"] == pytest.approx((0 + 90 + 180 + 45) / 4)
    assert row["other_angle"] == pytest.approx((90 + 0 + 90 + 45) / 4)
    assert row["test_error"] == 50  # the second, and the third, whose logits are 0 and -4
    assert sum(row["angle_counts"]["own"]) == 4
    assert row["unanswered"] == 0
    first = classification.measure(features[:1], class_vectors, torch.tensor([0]))
    assert first["unanswered"] == 1, "the own class, since the other one is the answer"


def pairs_of(same: np.ndarray, fold: np.ndarray) -> pairs_module.Pairs:
    index = torch.arange(len(same))
    return pairs_module.Pairs(index, index, torch.from_numpy(same), torch.from_numpy(fold))


def test_fold_accuracies_against_every_threshold():
    """Red if a threshold sees its own fold, or is not the best of the others."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    same = rng.random(80) < 0.5
    scores = np.where(same, 0.3, 0.0) + 0.3 * rng.standard_normal(80)
    fold = np.repeat(np.arange(4), 20)
    for k, measured in enumerate(verification.fold_accuracies(scores, pairs_of(same, fold))):
        rest = fold != k
        threshold = verification.best_threshold(scores[rest], same[rest])
        best = max(
            ((scores[rest] > t) == same[rest]).mean() for t in [-np.inf, *scores[rest].tolist()]
        )
        assert ((scores[rest] > threshold) == same[rest]).mean() == best
        assert measured == 100 * ((scores[~rest] > threshold) == same[~rest]).mean()


def test_curve_of_known_scores():
    # Different pairs: 0.0, 0.1 .. 9.9; same pairs: the same moved by 2, so that at a threshold t
    # FAR = (10 - t) / 10 and TAR = (12 - t) / 10: they are 1 - TAR = FAR = 0.4 at t = 6.
    different = np.arange(1000) / 100
    scores = np.concatenate([different, different + 2])
    same = np.arange(2000) >= 1000
    curve = verification.curve(scores, same)
    assert curve["eer"] == pytest.approx(40, abs=0.11)
    assert curve["tar_1e-2"] == pytest.approx(21, abs=0.11)
    assert curve["tar_1e-3"] == pytest.approx(20.1, abs=0.11)
    assert curve["roc"][-1] == 100
    assert len(curve["roc"]) == len(verification.FAR_GRID)
    perfect = verification.curve(same.astype(float), same)
    assert (perfect["eer"], perfect["tar_1e-3"]) == (0, 100)


def test_nobody_in_the_tested_fold_is_trained_on():
    """Red if a person of a tested pair is known to the network."""
    identities = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 4, 4])
    pairs = pairs_module.Pairs(
        torch.tensor([0, 2, 4]),
        torch.tensor([1, 4, 8]),
        torch.tensor([True, False, False]),
        torch.tensor([0, 0, 1]),
    )
    faces = pairs_module.Verification(
        torch.zeros(10, 1, 4, 4), identities, torch.zeros(10, 1, 4, 4), identities, pairs
    )
    chosen, labels = recognition.known(faces, fold=0, least=2)
    assert chosen.tolist() == [7, 8, 9]  # people 0, 1 and 2 are in fold 0; 3 has one image
    assert labels.tolist() == [0, 0, 0]
    chosen, labels = recognition.known(faces, fold=1, least=1)
    assert chosen.tolist() == [0, 1, 2, 3, 6]
    assert labels.tolist() == [0, 0, 1, 1, 2]
    assert len(recognition.known(faces, fold=None, least=1)[0]) == 10


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "shape"),
    [
        *((setting, (1, 28, 28)) for setting in mnist.SETTINGS.values()),
        *((setting, (3, 32, 32)) for setting in [*cifar.SETTINGS.values(), *cifar.PAPER.values()]),
        *((setting, (1, 64, 64)) for setting in lfw.SETTINGS.values()),
        *((setting, (1, 35, 35)) for setting in omniglot.SETTINGS.values()),
    ],
)
def test_every_recipe_builds(setting, shape):
    """Red if a network does not fit its images, or a schedule cannot be made."""
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    network = setting.network(images, setting.features).eval()
    with torch.no_grad():
        assert network(images).shape == (2, setting.features)
    assert setting.schedule(1000).value(0) == 1000


def test_the_authors_networks():
    """Convolutions and their channels as in the published files of MNIST and CIFAR-10."""
    for setting, shape, widths in (
        (mnist.SETTINGS["paper"], (1, 28, 28), [64] * 4 + [128] * 3 + [256] * 3),
        (cifar.PAPER[True], (3, 32, 32), [64] * 5 + [128] * 4 + [256] * 4),
    ):
        network = setting.network(torch.randint(0, 256, (2, *shape)), setting.features)
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        assert [layer.out_channels for layer in layers] == widths
        assert {layer.kernel_size for layer in layers} == {(3, 3)}
        (full,) = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        assert (full.in_features, full.out_features) == (256 * 4 * 4, 512)
        spread = full.weight.std().item()
        assert spread == pytest.approx(math.sqrt(2 / (256 * 16)), rel=0.02), "He's"


def test_standardise():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8) // torch.tensor(
        [1, 2, 4]
    ).view(3, 1, 1)
    out = networks.Standardise.of(images)(images)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


# ---- experiments ---------------------------------------------------------------------------------


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
    options += ["--keep", "0.25"]
    rows = omniglot.main([*options, "--device", device, "--output", str(output)])
    assert [row["identities"] for row in rows] == [10, 10]
    assert all(row["accuracy"] > 80 and row["eer"] < 25 for row in rows)
    check_pictures(output, "roc.png", "training.png")
    assert "Ten folds" in capsys.readouterr().out
    settings = json.loads((output / "results.json").read_text())["settings"]
    schedule = lsoftmax.LambdaSchedule.for_steps(4, keep=0.25)
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
    options = ["--margins", "1", "2", "--seeds", "1", "--folds", "2", "--epochs", "2"]
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
    few, many = (lsoftmax.LambdaSchedule.for_steps(2 * (n // 128)) for n in (288, 296))
    assert few.extra_repr() == many.extra_repr() == settings["schedule"]
    with pytest.raises(SystemExit, match="other settings"):
        lfw.main([*options, "--least", "3", "--output", str(output)])
    with pytest.raises(SystemExit, match="--least 9: nobody"):
        lfw.main([*options, "--least", "9", "--output", str(output)])


def test_keep_of_the_authors_curve():
    args = argparse.Namespace(epochs=None, keep=0.25)
    schedule = experiment.chosen(cifar.PAPER[False], args).schedule(30_000)
    expected = lsoftmax.LambdaSchedule(1000.0, 2e-5, 45.0, keep=0.25)
    assert schedule.extra_repr() == expected.extra_repr()


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
