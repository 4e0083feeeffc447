"""Inference leaves the package behind: torch.export and ONNX of body and class vectors."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lsoftmax import LSoftmaxLinear, LSoftmaxLoss


class Classifier(nn.Module):
    """What is shipped: no targets, no schedule."""

    def __init__(self, body: nn.Module, classes: nn.Module) -> None:
        super().__init__()
        self.body, self.classes = body, classes

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.body(images).flatten(1))


@pytest.fixture(params=["LSoftmaxLoss", "LSoftmaxLinear"])
def model(request: pytest.FixtureRequest) -> Classifier:
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU())
    if request.param == "LSoftmaxLoss":
        return Classifier(body, LSoftmaxLoss(4 * 8 * 8, 10).linear).eval()
    return Classifier(body, LSoftmaxLinear(4 * 8 * 8, 10)).eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 8, 8)


BATCH = {"images": {0: torch.export.Dim("batch")}}


def test_export(model: Classifier) -> None:
    program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (1, 2, 17):
        x = images(n)
        torch.testing.assert_close(loaded(x), model(x))
    assert not [node for node in program.graph.nodes if "lsoftmax" in str(node.target)]


@pytest.mark.parametrize("model", ["LSoftmaxLoss"], indirect=True)
def test_onnx(model: Classifier, tmp_path: Path) -> None:
    """Numbers from onnxruntime, at another batch size than that of the export."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"the export to ONNX needs {package}")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the comparison needs onnxruntime")
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(model, (images(2),), path, dynamo=True, dynamic_shapes=BATCH)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(7)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_loss_itself() -> None:
    """For a training elsewhere: there the op stays an op."""
    head = LSoftmaxLoss(6, 5, lam=0.5)
    x, y = torch.randn(8, 6), torch.randint(5, (8,))
    program = torch.export.export(head, (x, y))
    torch.testing.assert_close(program.module()(x, y), head(x, y))
    annealed = LSoftmaxLoss(6, 5)  # in training mode: it goes on with the angle of each batch
    torch.export.export(annealed, (x, y)).module()(x, y)
    assert [node for node in program.graph.nodes if "lsoftmax" in str(node.target)]


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_any_number_of_rows(training: bool) -> None:
    """Red if a choice by size binds the program: the dimension has no upper bound."""
    head = LSoftmaxLoss(6, 5, lam=0.5).train(training)
    rows = {0: torch.export.Dim("batch")}
    given = torch.randn(8, 6), torch.randint(5, (8,))
    program = torch.export.export(head, given, dynamic_shapes=(rows, rows))
    for n in (1, 3, 1000):
        x, y = torch.randn(n, 6), torch.randint(5, (n,))
        torch.testing.assert_close(program.module()(x, y), head(x, y))
