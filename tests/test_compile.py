"""torch.compile and CUDA graphs over whole trainings: one graph for every lam and batch size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lsoftmax import LambdaSchedule, LSoftmaxLinear, LSoftmaxLoss
from problems import nearest


class Model(nn.Module):
    """A body and a head, from inputs (N, 6) and targets (N,) to a scalar loss."""

    def __init__(self, lam: LambdaSchedule, layer: type = LSoftmaxLoss, again: bool = False):
        super().__init__()
        self.body, self.head, self.again = nn.Linear(6, 8), layer(8, 10, lam=lam), again

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.again:
            return checkpoint(self._loss, x, y, use_reentrant=False)
        return self._loss(x, y)

    def nearest(self, x: Tensor) -> Tensor:
        """Targets of these inputs."""
        return nearest(self.body(x).relu(), self.head)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.head(self.body(x).relu(), y)
        return out if out.dim() == 0 else nn.functional.cross_entropy(out, y)


def assert_same_training(model: nn.Module, compiled: nn.Module, twin: nn.Module, sizes) -> None:
    """Losses, parameters and the schedule's bits, beside the twin that runs as it is written."""
    device = model.body.weight.device
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for n in sizes:
        x = torch.randn(n, 6).to(device)
        y = model.nearest(x)
        losses = compiled(x, y), twin(x, y)
        torch.testing.assert_close(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model.head.schedule.steps == twin.head.schedule.steps == len(sizes)
    torch.testing.assert_close(model.head.lam, twin.head.lam, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.head.schedule.share, twin.head.schedule.share)
    assert model.head.schedule.share > 0 or model.head.schedule.keep is None


def compile_whole(model: nn.Module, **options) -> nn.Module:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


def graphs() -> int:
    """Since ``compile_whole``: 1 is no recompile."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("layer", "schedule"),
    [
        (LSoftmaxLoss, LambdaSchedule.by_angle()),
        (LSoftmaxLoss, LambdaSchedule.by_angle(num_classes=10)),
        (LSoftmaxLinear, LambdaSchedule(1000.0, 0.12, 1.0, 5.0)),
    ],
)
def test_one_graph_for_all_of_the_annealing(
    layer: type, schedule: LambdaSchedule, device: str
) -> None:
    model = Model(copy.deepcopy(schedule), layer).to(device)
    twin, compiled = copy.deepcopy(model), compile_whole(model)
    assert_same_training(model, compiled, twin, sizes=[5] * 12)
    assert graphs() == 1
    assert schedule.keep is not None or model.head.lam < 900, "lam has to have changed"


def test_one_graph_for_all_batch_sizes() -> None:
    model = Model(LambdaSchedule.by_angle())
    twin, compiled = copy.deepcopy(model), compile_whole(model, dynamic=True)
    assert_same_training(model, compiled, twin, sizes=[5, 12, 7, 64, 2])
    assert graphs() == 1


def test_a_second_size_costs_one_more_graph() -> None:
    """Without dynamic=True: from then on the batch is dynamic."""
    model = Model(LambdaSchedule.by_angle())
    twin, compiled = copy.deepcopy(model), compile_whole(model)
    assert_same_training(model, compiled, twin, sizes=[5, 12, 7, 64])
    assert graphs() == 2


def test_a_checkpoint_within_the_graph() -> None:
    """One step, counted once. The graph recomputes from the buffers as they are by then, so with
    the next step's lam: its gradient is the twin's only where lam does not change.
    """
    model = Model(LambdaSchedule(5.0, 0.1, 1.0, minimum=5.0), again=True)
    twin = copy.deepcopy(model)
    twin.again = False
    assert not model.head.schedule.is_constant
    assert_same_training(model, compile_whole(model), twin, sizes=[5] * 3)


@pytest.mark.parametrize("num_classes", [None, 10])
def test_a_training_step_captured_whole(device: str, backend: str, num_classes: int | None) -> None:
    """Forward, backward, optimizer and annealing in one CUDA graph, replayed over an annealing."""
    if backend != "cuda":
        pytest.skip("needs a GPU")
    model = Model(LambdaSchedule.by_angle(num_classes=num_classes)).to(device)
    inputs = [torch.randn(32, 6).to(device) for _ in range(12)]
    data = [(features, model.nearest(features)) for features in inputs]
    x, y = (each.clone() for each in data[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # momentum begins, cuBLAS takes its workspaces
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for features, labels in data:
        x.copy_(features)
        y.copy_(labels)
        graph.replay()
        twin_optimizer.zero_grad()
        loss = twin(x, y)
        loss.backward()
        twin_optimizer.step()
        torch.testing.assert_close(captured, loss.detach())
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model.head.schedule.steps == twin.head.schedule.steps == 3 + len(data)
    torch.testing.assert_close(model.head.lam, twin.head.lam, rtol=1e-4, atol=0)
    assert model.head.schedule.share > 0
