"""margin_stats against the definitions, in numpy and float64, row by row and class by class."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import lsoftmax
from lsoftmax import diagnostics


def expected(x, w, y, margin: int, lam: float) -> dict:
    """By the paper's formulas with arccos, one row at a time."""
    x, w = (t.double().cpu().numpy() for t in (x, w))
    angles, correct, satisfied = [], [], []
    buckets = np.zeros(margin)
    for row, own in zip(x, y.tolist(), strict=True):
        a, b = np.sqrt((row**2).sum()), np.sqrt((w[own] ** 2).sum())
        if a > 0 and b > 0:
            theta = math.acos(np.clip(row @ w[own] / (a * b), -1, 1))
            k = min(int(theta * margin / math.pi), margin - 1)
            psi = (-1) ** k * math.cos(margin * theta) - 2 * k
            f = (lam * row @ w[own] + a * b * psi) / (1 + lam)
            angles.append(math.degrees(theta))
            buckets[k] += 1
        else:
            f = 0.0
        others = [row @ w[j] for j in range(len(w)) if j != own]
        correct.append(row @ w[own] > max(others, default=-math.inf))
        satisfied.append(f > max(others, default=-math.inf))
    x_norms, w_norms = np.linalg.norm(x, axis=1), np.linalg.norm(w, axis=1)
    return {
        "angle": np.mean(angles),
        "angle_10": np.quantile(angles, 0.1),
        "angle_50": np.quantile(angles, 0.5),
        "angle_90": np.quantile(angles, 0.9),
        "buckets": (buckets / len(angles)).tolist(),
        "accuracy": np.mean(correct),
        "satisfied": np.mean(satisfied),
        "input_norm_min": x_norms.min(),
        "input_norm": x_norms.mean(),
        "input_norm_max": x_norms.max(),
        "weight_norm_min": w_norms.min(),
        "weight_norm": w_norms.mean(),
        "weight_norm_max": w_norms.max(),
        "zero_inputs": np.mean(x_norms == 0),
        "lost_classes": np.sum(w_norms < 0.01 * w_norms.mean()),
        "lam": lam,
    }


def batch(n: int = 61, d: int = 7, c: int = 9, dtype=torch.float32):
    """Features at all angles to their classes, some of them near."""
    w = torch.randn(c, d, dtype=dtype)
    y = torch.randint(c, (n,))
    nearness = 3 * torch.rand(n, 1, dtype=dtype)
    return torch.randn(n, d, dtype=dtype) + nearness * w[y], w, y


def check(stats: lsoftmax.MarginStats, want: dict, rel: float = 2e-5) -> None:
    got = stats.floats()
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=rel, abs=1e-6), name


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_figure(margin, lam, dtype):
    x, w, y = batch(dtype=dtype)
    check(lsoftmax.margin_stats(x, w, y, margin, lam), expected(x, w, y, margin, lam))


def test_zero_rows_and_lost_classes():
    """Red if a row without an angle poisons the means, or counts as an angle of its own."""
    x, w, y = batch()
    x[:5] = 0
    w[2] = 0
    w[4] *= 1e-6
    y[5:9] = 2
    check(lsoftmax.margin_stats(x, w, y, 3, torch.tensor(0.4)), expected(x, w, y, 3, 0.4) | {})


def test_all_zero():
    stats = lsoftmax.margin_stats(torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor([0, 1, 0]), 2)
    got = stats.floats()
    assert math.isnan(got["angle"])
    assert got["satisfied"] == 0
    assert got["zero_inputs"] == 1
    assert got["lost_classes"] == 2


def test_angles_near_zero_and_a_half_turn():
    """Red if the angle comes from arccos, which in float32 sees nothing below 0.02 degrees."""
    w = torch.randn(1, 64)
    across = torch.randn(64)
    across -= (across @ w[0]) / (w[0] @ w[0]) * w[0]
    across *= w.norm() / across.norm()
    for sign, base in ((1.0, 0.0), (-1.0, 180.0)):
        x = sign * (w + math.tan(math.radians(0.004)) * across)
        got = lsoftmax.margin_stats(x, w, torch.tensor([0]), 4)
        assert abs(got.angle.item() - base) == pytest.approx(0.004, rel=0.05)


def test_panels_of_classes(monkeypatch):
    """Red if the largest other logit is looked for in some panels only, or the own is not left out
    in the one it is in.
    """
    monkeypatch.setattr(diagnostics, "_PANEL", 100)
    x, w, y = batch(n=33, c=50)
    check(lsoftmax.margin_stats(x, w, y, 2, 0.1), expected(x, w, y, 2, 0.1))


@pytest.mark.parametrize(("x_scale", "w_scale"), [(2.0**-90, 1.0), (2.0**65, 1.0), (1.0, 2.0**-80)])
def test_norms_whose_squares_are_no_float32(x_scale, w_scale):
    """Red if a tiny row counts as zero, or a huge one as infinite."""
    x, w, y = batch()
    got = lsoftmax.margin_stats(x * x_scale, w * w_scale, y, 3).floats()
    for name, value in lsoftmax.margin_stats(x, w, y, 3).floats().items():
        scale = x_scale if name.startswith("input_norm") else 1.0
        scale = w_scale if name.startswith("weight_norm") else scale
        assert got[name] == pytest.approx(np.multiply(value, scale).tolist(), rel=1e-6), name


def test_one_class_and_one_row():
    x, w, y = batch(n=1, c=1)
    check(lsoftmax.margin_stats(x[0], w, y[0], 2), expected(x, w, y, 2, 0.0))


def test_features_of_no_size() -> None:
    """The loss takes them; there is no angle."""
    stats = lsoftmax.margin_stats(torch.randn(3, 0), torch.randn(4, 0), torch.tensor([0, 1, 1]))
    assert stats.input_norm == 0


def test_features_of_autocast():
    x, w, y = batch()
    narrow = x.bfloat16()
    check(lsoftmax.margin_stats(narrow, w, y, 4, 0.3), expected(narrow, w, y, 4, 0.3))


@pytest.mark.parametrize("kind", [lsoftmax.LSoftmaxLoss, lsoftmax.LSoftmaxLinear])
def test_a_layer_in_training(device, kind):
    """By its own class vectors, margin and lam, on whatever runs the ops; no gradient is recorded.
    Its state stays, and what was measured before a step.
    """
    x, _, y = (t.to(device) for t in batch())
    layer = kind(7, 9, 3, lam=lsoftmax.LambdaSchedule(10.0, 1.0, 1.0)).to(device)
    x.requires_grad_()
    layer(x, y).sum().backward()
    lam = layer.lam.item()
    stats = layer.margin_stats(x, y)
    assert not any(value.requires_grad for value in stats)
    truth = expected(x.detach(), next(layer.parameters()).detach(), y, 3, lam)
    assert layer.lam == lam
    layer(x, y)
    assert layer.lam < lam
    check(stats, truth, rel=1e-4)


def test_ignored_rows_do_not_count(device):
    """Those of a padded batch, and a row alone."""
    x, w, y = (t.to(device) for t in batch())
    head = lsoftmax.LSoftmaxLoss(7, 9, 3, lam=0.7, ignore_index=8, device=device, dtype=w.dtype)
    head.load_state_dict({"linear.weight": w})
    y[::3], y[1] = 8, 2
    kept = y != 8
    check(head.margin_stats(x, y), expected(x[kept], w, y[kept], 3, 0.7))
    check(head.margin_stats(x[1], y[1]), expected(x[1:2], w, y[1:2], 3, 0.7))
    for rows in (slice(0, 1), 0):
        with pytest.raises(ValueError, match="at least one row"):
            head.margin_stats(x[rows], y[rows])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"margin": 0}, ValueError, "margin.*>= 1"),
        ({"lam": -1.0}, ValueError, "lam.*>= 0"),
        ({"input": torch.zeros(4, 2)}, ValueError, "input.*D = 3"),
        ({"input": torch.zeros(0, 3), "target": torch.zeros(0).long()}, ValueError, "one row"),
        ({"input": [[1.0]]}, TypeError, "input.*list"),
        ({"target": torch.zeros(4)}, TypeError, "target.*int64"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target.*\(4,\)"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "input": torch.randn(4, 3),
        "linear_weight": torch.randn(5, 3),
        "target": torch.arange(4),
    }
    with pytest.raises(error, match=message):
        lsoftmax.margin_stats(**{**good, **change})


def warning_of(x, w, y, margin: int = 4, lam: float = 0.3) -> str | None:
    return lsoftmax.collapse_warning(lsoftmax.margin_stats(x, w, y, margin, lam))


def test_collapse_is_told_in_words():
    x, w, y = batch()
    assert warning_of(x, w, y) is None
    assert warning_of(x, w, (y + 1) % 9) is None, "wrong, but not collapsing"

    dead = x.clone()
    dead[:20] = 0
    assert "33% of the features are exactly zero" in warning_of(dead, w, y)
    for margin, lam in ((4, 0.3), (2, 99.0)):
        assert "Let the margin set in later" in warning_of(dead, w, y, margin, lam)
    for margin, lam in ((1, 0.0), (4, 1000.0)):
        assert "not by the margin" in warning_of(dead, w, y, margin, lam)

    lost = w.clone()
    lost[[3, 5]] *= 1e-4
    assert "2 class vector(s) have shrunk" in warning_of(x, lost, y)

    assert "no logit exceeds" in warning_of(1e-3 * x, 1e-3 * w, y)
    for x_factor, w_factor in ((math.nan, 1), (1, math.inf)):
        words = warning_of(x * x_factor, w * w_factor, y)
        assert "diverging" in words
        assert "not finite" in words
    size = x.norm(dim=1).mean() * w.norm(dim=1).mean()
    assert warning_of(x * (900 / size), w, y) is None
    assert "logits of 1e+04" in warning_of(x * (1e4 / size), w, y)


def test_warning_in_a_training_that_collapses():
    """The failure that users report: m = 4 at full strength from the first step, features after a
    ReLU. With annealing the same training gives no warning.
    """
    directions = torch.randn(10, 20)
    labels = torch.randint(10, (2000,))
    inputs = directions[labels] + 0.6 * torch.randn(2000, 20)
    start = torch.get_rng_state()
    warnings = {}
    for lam in (0.0, lsoftmax.LambdaSchedule(1000.0, 0.0216, 4.0, 0.3)):
        torch.set_rng_state(start)
        body = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU())
        head = lsoftmax.LSoftmaxLoss(32, 10, 4, lam=lam)
        optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], 0.1, momentum=0.9)
        for part in torch.randint(2000, (400, 64)):
            loss = head(body(inputs[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x = body(inputs).detach()
        warnings[lam == 0.0] = lsoftmax.collapse_warning(head.margin_stats(x, labels))
    assert warnings[True] is not None
    assert warnings[False] is None
