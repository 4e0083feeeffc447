"""Classes of unequal size in the examples: weights, balanced batches, clipped gradients."""
# ruff: noqa: E402

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the examples need {package}")

from sklearn.utils.class_weight import compute_class_weight

import balance
import experiment
import sampled
import training
from test_training import SETTING

pytestmark = pytest.mark.usefixtures("one_thread")


def unequal() -> tuple[torch.Tensor, torch.Tensor]:
    """400 images of four classes, which have 300, 60, 30 and 10."""
    counts = torch.tensor([300, 60, 30, 10])
    labels = torch.arange(4).repeat_interleave(counts)[torch.randperm(400)]
    return torch.randint(0, 256, (400, 1, 8, 8), dtype=torch.uint8), labels


def prepared(device: str, sample_rate: float = 1.0, **recipe) -> training.Training:
    images, labels = (t.to(device) for t in unequal())
    setting = replace(SETTING, recipe=replace(SETTING.recipe, **recipe))
    return experiment.prepare(setting, images, labels, 4, 2, seed=3, sample_rate=sample_rate)


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
@pytest.mark.parametrize(
    ("way", "begins"), [(balance.WEIGHTS, 0), (balance.DEFERRED, 4), (None, 5)], ids=str
)
def test_class_weights(device, way, begins, sample_rate):
    """scikit-learn's "balanced", from the first epoch on or in the last of five. Red if the loss
    has none, or at another time, or where classes are sampled.
    """
    with sampled.group_of_one(torch.device(device)):
        begun = prepared(device, sample_rate, epochs=5, balance=way)
        labels = begun.labels.cpu().numpy()
        balanced = compute_class_weight("balanced", classes=np.arange(4), y=labels).tolist()
        for epoch in range(5):
            begun.run_epoch()
            weight = begun.criterion.weight
            if way is None:
                assert weight is None
            else:
                expected = balanced if epoch >= begins else [1.0] * 4
                assert weight.tolist() == pytest.approx(expected, rel=1e-6)


def test_balanced_batches(device):
    """A quarter of the images is of each class, and an epoch is as long as ever. Red if images are
    drawn as they are, or every epoch alike.
    """
    begun = prepared(device, balance=balance.BATCHES)
    orders = [begun.order() for _ in range(20)]
    assert all(len(order) == 400 for order in orders)
    assert not torch.equal(orders[0], orders[1])
    shares = begun.labels.cpu()[torch.cat(orders)].bincount(minlength=4) / 8000
    assert (shares - 0.25).abs().max() < 0.03  # six standard deviations
    every = prepared(device).order()
    assert torch.equal(every.sort().values, torch.arange(400))


@pytest.mark.parametrize("way", [balance.BATCHES, balance.DEFERRED])
@pytest.mark.parametrize("epochs", [2, 3, 4])
def test_goes_on_to_the_same_bits(device, way, epochs, tmp_path):
    """On either side of where the weights come in. Red if what is drawn or weighed depends on
    anything that the checkpoint does not hold.
    """

    def begun() -> training.Training:
        torch.manual_seed(1)
        return prepared(device, epochs=5, balance=way, clip=1.0)

    straight, killed, checkpoint = begun().run(), begun(), tmp_path / "run.pt"
    for _ in range(epochs):
        killed.run_epoch()
    torch.save(killed.state_dict(), checkpoint)
    assert begun().run(checkpoint=checkpoint).history == straight.history


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_clipped_gradients(device, clip, sample_rate):
    """All gradients together. Red if the network's or the class vectors' are left out, or where
    classes are sampled.
    """
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

    with sampled.group_of_one(torch.device(device)):
        begun = prepared(device, sample_rate, clip=clip)
        begun.optimizer.register_step_pre_hook(note)
        begun.run_epoch()
    assert len(norms) == 400 // 32
    if clip is None:
        assert max(norms) > 0.2
    else:
        assert norms == pytest.approx([clip] * len(norms), rel=1e-3)
