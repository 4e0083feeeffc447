"""The portable pass over the logits: what is in a panel, and rows whose logits are far apart."""

from __future__ import annotations

import pytest
import torch

from lsoftmax import functional, panels
from problems import problem, relative_error


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of 16 classes, so that a few hundred classes are many of them."""
    monkeypatch.setattr(panels, "_PANEL_LOGITS", 1)
    monkeypatch.setattr(panels, "_LEAST_CLASSES", 16)


BUDGETS = {"kept": None, "class chunks": 8 * 32 * 40}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rising", [1, -1])
def test_logits_that_rise_from_panel_to_panel(
    rising: int, dtype: torch.dtype, budget: int | None
) -> None:
    """Each panel is tens above the one before: references are raised, what is written rescaled."""
    p = problem(40, 24, 300, dtype)
    with torch.no_grad():
        p.w += p.x[0] / p.x[0].norm() ** 2 * torch.linspace(0, rising * 700, 300)[:, None].to(dtype)
        p.x[1::3] = p.x[0]
        p.x[1] *= 0.1
    p.y[:8] = torch.tensor([0, 15, 16, 17, 298, 299, 150, 160])
    options = {"margin": 4, "lam": 1.0, "label_smoothing": 0.1}
    ours = p.loss(memory_budget=budget, **options)
    truth = p.true_loss(**options)
    # In float32 a logit of 700 is off by up to 4e-5, and so is its exponential.
    loss, gradient = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-4)}.get(
        dtype, (1e-6, 6e-3)
    )
    assert relative_error(ours[0], truth[0]) <= loss
    assert relative_error(ours[1], truth[1]) <= gradient
    assert relative_error(ours[2], truth[2]) <= gradient


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_a_target_far_above_the_others(budget: int | None) -> None:
    """The others' exponentials vanish beside the target's; smoothing pulls at each of them."""
    p = problem(30, 8, 100, torch.float32)
    with torch.no_grad():
        p.x.copy_(400 * p.w[p.y] / p.w[p.y].norm(dim=1, keepdim=True))
    for smoothing in (0.0, 0.2):
        ours = p.loss(margin=1, label_smoothing=smoothing, memory_budget=budget)
        truth = p.true_loss(margin=1, label_smoothing=smoothing)
        for value, true in zip(ours, truth, strict=True):
            assert value.isfinite().all()
            assert relative_error(value, true) < 1e-5 or true.norm() < 1e-30


def test_panels_are_all_of_the_logits() -> None:
    p = problem(7, 5, 101, torch.float64)
    x, w = p.x.detach(), p.w.detach()
    whole = torch.empty(7, 101, dtype=torch.float64)
    for out in (None, torch.empty_like(whole)):
        for classes, rows, z in panels.panels(x, w, 0, out):
            assert torch.equal(rows, w[classes])
            whole[:, classes] = z
        torch.testing.assert_close(whole, x @ w.T)
        if out is not None:
            assert torch.equal(out, whole)


def test_non_target_logits_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one panel, the logits are x @ W.T to the bit, and so are the exponentials' arguments."""
    monkeypatch.undo()
    p = problem(9, 6, 40, torch.float32)
    x, w = p.x.detach(), p.w.detach()
    ((_, _, z),) = panels.panels(x, w, 0)
    assert torch.equal(z, x @ w.T)
    assert functional.plan(p.x, p.w).class_chunk == 0
