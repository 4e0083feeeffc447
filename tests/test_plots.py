"""``python -m lsoftmax plot``: that the pictures show what is true, and are files one can open."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from matplotlib.image import imread

from lsoftmax import __main__ as command
from lsoftmax import plots

pytestmark = pytest.mark.usefixtures("one_thread")


def lines(axes) -> list[tuple[np.ndarray, np.ndarray]]:
    """The curves of a panel; a marker line has two points only."""
    drawn = [line.get_data() for line in axes.get_lines()]
    return [(np.asarray(x), np.asarray(y)) for x, y in drawn if len(x) > 2]


def psi_of(degrees: np.ndarray, margin: int) -> np.ndarray:
    """The paper's equation 6, with arccos and a bucket by division."""
    theta = np.radians(degrees)
    k = np.minimum(np.floor(theta * margin / math.pi), margin - 1)
    return (-1) ** k * np.cos(margin * theta) - 2 * k


def test_psi_and_its_slope():
    curves, slopes = plots.draw_psi().axes
    for margin, (x, y), (_, slope) in zip((1, 2, 3, 4), lines(curves), lines(slopes), strict=True):
        assert (x.min(), x.max()) == pytest.approx((0, 180))
        np.testing.assert_allclose(y, psi_of(x, margin), atol=1e-9)
        steepest = margin * np.abs(np.sin(margin * np.radians(x)))
        np.testing.assert_allclose(slope, steepest, atol=1e-6)


def test_loss_of_a_turning_feature():
    """Against the cross-entropy of two logits, f and the other's, written out here."""
    by_margin, by_lam = plots.draw_loss(norms=5.0).axes
    cases = [(margin, 0.0) for margin in (1, 2, 3, 4)]
    cases += [(4, lam) for lam in (1000.0, 10.0, 5.0, 1.0, 0.3, 0.0)]
    for (margin, lam), (x, y) in zip(cases, lines(by_margin) + lines(by_lam), strict=True):
        theta = np.radians(x)
        f = 5 * (lam * np.cos(theta) + psi_of(x, margin)) / (1 + lam)
        np.testing.assert_allclose(y, np.logaddexp(0, 5 * np.sin(theta) - f), atol=1e-6)


@pytest.mark.parametrize("margin", [1, 2, 4])
def test_regions_are_those_of_the_geometry(margin):
    """By angles: a class is decided where |w| psi(theta) is above |w'| cos(theta')."""
    # So alike that both have regions: |w| alone can leave a class none.
    lengths = 0.8 + 0.4 * torch.rand(2, dtype=torch.float64)
    apart = math.pi * (0.3 + 0.6 * torch.rand(()).item())
    weight = lengths.unsqueeze(1) * torch.tensor(
        [[1.0, 0.0], [math.cos(apart), math.sin(apart)]], dtype=torch.float64
    )
    turn = torch.rand(500, dtype=torch.float64) * 2 * math.pi
    points = torch.stack((turn.cos(), turn.sin()), 1) * (0.1 + torch.rand(500, 1).double())
    decided = plots.regions(weight, points, margin).numpy()
    to_first = np.degrees(np.abs((turn.numpy() + math.pi) % (2 * math.pi) - math.pi))
    to_second = np.degrees(np.abs((turn.numpy() - apart + math.pi) % (2 * math.pi) - math.pi))
    b = lengths.numpy()
    first = b[0] * psi_of(to_first, margin) - b[1] * np.cos(np.radians(to_second))
    second = b[1] * psi_of(to_second, margin) - b[0] * np.cos(np.radians(to_first))
    expected = np.where(first > 0, 0, np.where(second > 0, 1, -1))
    clear = np.minimum(np.abs(first), np.abs(second)) > 1e-9
    assert clear.sum() > 450
    assert np.array_equal(decided[clear], expected[clear])
    assert {0, 1} <= set(decided)
    assert (-1 in decided) == (margin > 1), "only a margin leaves directions to neither"


def test_boundary_shows_every_case():
    """Cones that fill the circle; as drawn, softmax's meet where its logits are equal."""
    panels = plots.draw_boundary().axes
    assert len(panels) == 9
    for axes in panels:
        cones = [(cone.theta1, cone.theta2) for cone in axes.patches]
        assert sum(end - start for start, end in cones) == pytest.approx(360, abs=0.5)
    meet = {round(end) for _, end in [(c.theta1, c.theta2) for c in panels[0].patches]}
    assert meet == {90, 270, 360}
    assert [axes.get_ylabel() for axes in panels[::3]] == [
        "softmax",
        "L-Softmax, m = 2",
        "L-Softmax, m = 4",
    ]
    assert [axes.get_title() for axes in panels[:3]] == [
        "|W₁| = |W₂|",
        "|W₁| > |W₂|",
        "|W₁| < |W₂|",
    ]


@pytest.mark.parametrize("picture", ["psi", "loss", "boundary", "features"])
def test_command(picture, tmp_path, capsys, monkeypatch):
    if picture == "features":
        pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
        from lsoftmax import digits

        monkeypatch.setattr(digits, "EPOCHS", 1)
    path = tmp_path / "picture.png"
    command.main(["plot", picture, "-o", str(path)])
    pixels = imread(path)[..., :3]
    assert pixels.std() > 0.05, "blank"
    assert pixels.shape[1] > 600
    assert str(path) in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path], "a temporary file was left"


def test_features_of_digits_are_learned():
    """Red if the margin does not reach the training, or it leaves torch's random numbers moved."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from lsoftmax import digits

    before = torch.get_rng_state()
    (softmax, margin), labels = digits.learn_all((1, 3))
    assert torch.equal(torch.get_rng_state(), before)

    def angle(panel: plots.Features) -> float:
        cosines = torch.cosine_similarity(panel.features, panel.class_vectors[labels])
        return cosines.clamp(-1, 1).acos().rad2deg().mean().item()

    assert softmax.features.shape == (len(labels), 2)
    assert angle(margin) < angle(softmax) < 20
    assert f"{angle(margin):.1f}" in margin.title


def test_no_subcommand_is_the_report(capsys):
    command.main([])
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot"], "picture"),
        (["plot", "cat"], "choose from"),
        (["plot", "psi", "-o", "/nowhere/psi.png"], "can't be written: "),
        (["plot", "psi", "-o", "a" * 300 + ".png"], "can't be written: "),
        (["plot", "psi", "-o", "."], "expected a file to write"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_missing_package_is_named(package, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("lsoftmax.plots", "lsoftmax.digits"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("plots", "digits"):
        monkeypatch.delattr(f"lsoftmax.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"{package}, which.*pip install 'lsoftmax\[plot\]'"):
        command.main(["plot", "features", "-o", str(tmp_path / "a.png")])


def test_pictures_are_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "psi.png"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        plots.save(plots.draw_psi(), Path(path))
    with pytest.raises(SystemExit, match=r"psi.png can't be written: No space"):
        command.main(["plot", "psi", "-o", str(path)])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("ending", "start"), [("pdf", b"%PDF"), ("SVG", b"<?xml")])
def test_pictures_are_what_their_names_say(ending, start, tmp_path):
    path = tmp_path / f"psi.{ending}"
    command.main(["plot", "psi", "-o", str(path)])
    assert path.read_bytes().startswith(start)


def test_a_name_that_is_no_pictures_is_refused_before_the_training(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from lsoftmax import digits

    monkeypatch.setattr(digits, "learn_all", lambda: 1 / 0)
    with pytest.raises(SystemExit, match=r"a.txt: expected a name that ends in .png, .pdf or .svg"):
        command.main(["plot", "features", "-o", str(tmp_path / "a.txt")])
