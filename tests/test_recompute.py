"""Activation checkpointing of what contains the head: a step is counted once, with its own lam."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lsoftmax import LambdaSchedule, LSoftmaxLinear, LSoftmaxLoss
from lsoftmax import plan as planning
from problems import nearest


class Network(nn.Module):
    def __init__(self, layer: type, lam: LambdaSchedule | float) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), layer(6, 20, margin=3, lam=lam)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.body(x).tanh(), y)


def steep() -> LambdaSchedule:
    """lam falls by a third in a step: the wrong one would show."""
    return LambdaSchedule(base=10.0, gamma=0.25, power=2.0)


def by_angle() -> LambdaSchedule:
    """With an angle to follow, which must not be taken in twice either."""
    return LambdaSchedule(base=10.0, gamma=0.25, power=2.0, keep=0.6)


def batch(network: Network) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 4, device=network.body.weight.device, requires_grad=True)
    return x, nearest(network.body(x).tanh(), network.head)


def train(network: Network, batches: list, run) -> list[Tensor]:
    """Parameters after a few steps, with what the schedule holds."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        out = run(network, x, y)
        out.backward(torch.linspace(0.5, 1, out.numel(), device=out.device).reshape(out.shape))
        optimizer.step()
    return [*network.state_dict().values()]


@pytest.mark.parametrize("schedule", [steep, by_angle])
@pytest.mark.parametrize("layer", [LSoftmaxLoss, LSoftmaxLinear])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_training_is_the_training(
    reentrant: bool, layer: type, schedule, device: str
) -> None:
    """Bit for bit: weights, steps, lam and the angle so far."""
    network = Network(layer, schedule()).to(device)
    twin, batches = copy.deepcopy(network), [batch(network) for _ in range(4)]
    ours = train(network, batches, lambda *args: checkpoint(*args, use_reentrant=reentrant))
    truth = train(twin, batches, lambda net, x, y: net(x, y))
    assert network.head.schedule.steps == 4
    assert network.head.schedule.share > 0 or schedule is steep
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("free", [(1 << 30, 100), (100, 1 << 30)], ids=["less", "more"])
def test_it_goes_the_way_of_its_first_run(free, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is free by then: what is saved for backward has other shapes in chunks."""
    seen = iter([*free, 1, 2, 3, 4])
    monkeypatch.setattr(planning, "_budgets", {})
    monkeypatch.setattr(planning, "_LITTLE", 0)
    monkeypatch.setattr(planning, "free_memory", lambda device: next(seen))
    network = Network(LSoftmaxLoss, 1.0)
    x, y = batch(network)
    checkpoint(network, x, y, use_reentrant=False).backward()
    ours = x.grad.clone()
    x.grad = None
    assert next(seen) == free[1], "the recomputation asked for nothing"
    network(x, y).backward()
    torch.testing.assert_close(ours, x.grad)


def test_without_early_stop(device: str) -> None:
    """Then the forward is run again to its very end, where the step is counted."""
    network = Network(LSoftmaxLoss, by_angle()).to(device)
    twin, batches = copy.deepcopy(network), [batch(network) for _ in range(3)]
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        ours = train(network, batches, lambda *args: checkpoint(*args, use_reentrant=False))
    truth = train(twin, batches, lambda net, x, y: net(x, y))
    assert network.head.schedule.share > 0
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a, b)


def test_second_backward_and_nested_checkpoints(device: str) -> None:
    network = Network(LSoftmaxLoss, steep()).to(device)
    x, y = batch(network)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(network, x, y, use_reentrant=False)

    loss = checkpoint(inner, x, y, use_reentrant=False)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])
    assert network.head.schedule.steps == 1
    truth = torch.autograd.grad(copy.deepcopy(network)(x, y), x)[0]
    assert not torch.equal(first, truth), "the next step has another lam"


def test_saved_tensors_elsewhere_change_nothing(device: str) -> None:
    """Hooks for saved tensors without a checkpoint: an ordinary forward, and a step of it."""
    network = Network(LSoftmaxLoss, steep()).to(device)
    for _ in range(2):
        x, y = batch(network)
        with torch.autograd.graph.save_on_cpu():
            network(x, y).backward()
    assert network.head.schedule.steps == 2


def test_a_checkpointed_body_as_usual(device: str) -> None:
    network = Network(LSoftmaxLoss, steep()).to(device)
    x, y = batch(network)
    features = checkpoint_sequential(
        nn.Sequential(network.body, nn.Tanh()), 2, x, use_reentrant=True
    )
    loss = network.head(features, y)
    loss.backward()
    assert network.head.schedule.steps == 1
    assert network.body.weight.grad.any()
