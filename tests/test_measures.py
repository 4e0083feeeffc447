"""What the examples' experiments are made of: their measures and their networks."""
# ruff: noqa: E402

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the examples need {package}")

import cifar
import classification
import lfw
import mnist
import networks
import omniglot
import pairs as pairs_module
import recognition
import verification

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
