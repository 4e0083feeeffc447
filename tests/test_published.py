"""Layers of other implementations taken over: the same logits before and after, with arccos."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsoftmax import LambdaSchedule, LSoftmaxLinear, LSoftmaxLoss, from_published

D, C = 6, 5


class Published(nn.Module):
    """The attributes of the published layers, and the paper's formula with an arccos."""

    def __init__(self, input_dim: int, output_dim: int, margin: int) -> None:
        super().__init__()
        self.input_dim, self.output_dim, self.margin = input_dim, output_dim, margin
        self.weight = nn.Parameter(torch.randn(input_dim, output_dim, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits, rows = x @ self.weight, torch.arange(len(y))
        norms = x.norm(dim=1) * self.weight[:, y].norm(dim=0)
        theta = torch.acos(logits[rows, y] / norms)
        k = (theta * self.margin / math.pi).floor()
        target = norms * ((-1) ** k * torch.cos(self.margin * theta) - 2 * k)
        lam = self.next_lam()
        return logits.index_put((rows, y), (lam * logits[rows, y] + target) / (1 + lam))

    def next_lam(self) -> float:
        return 0.0


class PublishedWithBeta(Published):
    """And with the other one's annealing, which counts in a Python attribute."""

    beta, beta_min, scale = 100.0, 3.0, 0.9

    def next_lam(self) -> float:
        lam = max(self.beta, self.beta_min)
        self.beta *= self.scale
        return lam


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(9, D, dtype=torch.float64), torch.randint(C, (9,))


@pytest.mark.parametrize("kind", [Published, PublishedWithBeta])
@pytest.mark.parametrize("classes", [C, D], ids=["C", "C is D"])
def test_the_same_logits_and_annealing(kind: type, classes: int) -> None:
    """From the middle of a training to beyond the annealing's floor."""
    theirs = kind(D, classes, margin=3)
    for _ in range(7):
        theirs(*batch())
    ours = from_published(theirs)
    assert isinstance(ours, LSoftmaxLinear)
    for _ in range(60):
        x, y = batch()
        norms = x.norm(dim=1) * theirs.weight[:, y].norm(dim=0)
        # lam is theirs to 1e-5, the target's logit moves by norms (cos - psi) / (1 + lam)^2 with it
        # (at most a quarter of six norms, times lam), and no other does.
        bound = (1.5e-5 * norms).unsqueeze(1) * F.one_hot(y, classes) + 1e-12
        assert ((ours(x, y) - theirs(x, y)).abs() <= bound).all()
    assert float(ours.lam) == (3.0 if kind is PublishedWithBeta else 0.0)
    x, _ = batch()
    torch.testing.assert_close(ours(x), x @ theirs.weight)
    assert ours.weight.dtype == torch.float64
    assert ours.weight.data_ptr() != theirs.weight.data_ptr()


def test_as_the_fused_loss() -> None:
    theirs = Published(D, C, margin=4).eval()
    ours = from_published(theirs, LSoftmaxLoss, label_smoothing=0.1)
    assert not ours.training
    x, y = batch()
    truth = F.cross_entropy(theirs(x, y), y, label_smoothing=0.1)
    torch.testing.assert_close(ours(x, y), truth)


def test_annealing_of_ones_own() -> None:
    theirs = PublishedWithBeta(D, C, margin=4)
    ours = from_published(theirs, lam=LambdaSchedule.by_angle(), margin=2)
    assert repr(ours.schedule) == repr(LambdaSchedule.by_angle())
    assert ours.margin == 2
    theirs.beta = 0.5  # below beta_min, which holds
    assert repr(from_published(theirs).schedule) == repr(LambdaSchedule.constant(3.0))


def test_a_state_dict_of_a_whole_model() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, D), "fc": Published(D, D, margin=4)})
    ours = from_published(model.state_dict(), margin=4, prefix="fc.")
    x, y = torch.randn(9, D, dtype=torch.float64), torch.randint(D, (9,))
    torch.testing.assert_close(ours(x, y), model["fc"](x, y))
    assert "fc.weight" in model.state_dict()


@pytest.mark.parametrize("scale", [1, 2.5])
def test_pytorch_metric_learning(scale: float) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.LargeMarginSoftmaxLoss(C, D, margin=3, scale=scale).double()
    x, y = batch()
    ours = from_published(theirs, LSoftmaxLoss)
    torch.testing.assert_close(ours(x, y), theirs(x, y))
    torch.testing.assert_close(ours.linear(x), theirs.get_logits(x))
    if scale == 1:
        again = from_published(theirs.state_dict(), LSoftmaxLoss, margin=3)
        assert torch.equal(again.linear.weight, ours.linear.weight)
    adapter = importlib.import_module("lsoftmax.metric_learning").LargeMarginSoftmaxLoss
    annealing = LambdaSchedule(10.0, 0.5, 2.0)
    annealing.step()
    goes_on = from_published(adapter(C, D, margin=3, lam=annealing), LSoftmaxLoss)
    assert goes_on.schedule is not annealing
    assert torch.equal(goes_on.schedule.upcoming(), annealing.upcoming())
    with pytest.raises(TypeError, match="got ArcFaceLoss"):
        from_published(losses.ArcFaceLoss(C, D), margin=3)


@pytest.mark.parametrize(
    ("source", "options", "error", "text"),
    [
        (nn.Linear(D, C, bias=False), {}, TypeError, r"got Linear; load_state_dict\(\) loads"),
        (LSoftmaxLinear(D, C), {}, TypeError, r"got LSoftmaxLinear; load_state_dict\(\) loads"),
        (LSoftmaxLoss(D, C), {}, TypeError, r"got LSoftmaxLoss; load_state_dict\(\) loads"),
        (nn.ReLU(), {"margin": 4}, TypeError, "got ReLU$"),
        ({"weight": torch.ones(D, C)}, {}, ValueError, "margin: expected .* None: .* pass margin="),
        ({"fc.weight": torch.ones(D, C)}, {"margin": 4}, ValueError, r"got fc\.weight"),
        ({"weight": torch.ones(D)}, {"margin": 4}, ValueError, r"expected shape \(D, C\)"),
        (
            LSoftmaxLinear(D, C).state_dict(),
            {"margin": 4},
            ValueError,
            r"load_state_dict\(\) loads",
        ),
        (None, {"margin": 4}, TypeError, "source: expected a layer or a state_dict, got NoneType"),
        ({"weight": 3}, {"margin": 4}, TypeError, "weight: expected a tensor, got int"),
        ({"weight": torch.ones(D, C)}, {"margin": 4, "layer": int}, TypeError, "layer: expected"),
        ({"W": torch.ones(D, C)}, {"margin": 2.5}, TypeError, "margin: expected an integer"),
    ],
)
def test_what_it_is_not_for(source, options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        from_published(source, **options)
