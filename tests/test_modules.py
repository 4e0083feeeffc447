"""The layers and the schedule: state, annealing, resuming, and the layers they stand in for."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lsoftmax
from lsoftmax import LambdaSchedule, LSoftmaxLinear, LSoftmaxLoss, reference


def batch(n: int = 8, d: int = 6, c: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, d), torch.randint(c, (n,))


def steep() -> LambdaSchedule:
    return LambdaSchedule(base=10.0, gamma=0.5, power=2.0, minimum=0.3)


# ---- the schedule --------------------------------------------------------------------------------


def test_schedule_is_caffes_rule() -> None:
    """Against the formula of the authors' layer, with the parameters of their CIFAR-10 recipe."""
    schedule = LambdaSchedule(base=1000.0, gamma=2e-5, power=45.0, minimum=0.0)
    for step in range(1, 200):
        schedule.step()
        caffe = max(0.0, 1000.0 * (1 + 2e-5 * step) ** -45)
        assert int(schedule.steps) == step
        assert float(schedule.lam) == pytest.approx(caffe, rel=1e-6)
        assert schedule.value(step) == pytest.approx(caffe, rel=1e-12)


def test_schedule_stops_at_its_minimum() -> None:
    schedule = steep()
    assert float(schedule.lam) == 10.0
    for _ in range(100):
        schedule.step()
    assert float(schedule.lam) == pytest.approx(0.3)


@pytest.mark.parametrize("layer", [LSoftmaxLoss, LSoftmaxLinear])
def test_only_training_forwards_advance(layer: type) -> None:
    head = layer(6, 5, lam=steep())
    x, y = batch()
    head(x, y)
    assert head.schedule.steps == 1
    assert float(head.lam) == pytest.approx(10.0 * 1.5**-2)
    with torch.no_grad():
        head(x, y)
    head.eval()
    head(x, y)
    head.train()
    if layer is LSoftmaxLinear:
        head(x)
    assert head.schedule.steps == 1
    head(x, y)
    assert head.schedule.steps == 2


@pytest.mark.parametrize("layer", [LSoftmaxLoss, LSoftmaxLinear])
def test_the_layer_is_its_function_at_the_current_lam(layer: type) -> None:
    """The first training step uses lam(1), not lam(0)."""
    head = layer(6, 5, margin=3, lam=steep())
    weight = head.linear.weight if layer is LSoftmaxLoss else head.weight
    function = reference.lsoftmax_loss if layer is LSoftmaxLoss else reference.lsoftmax_linear
    for step in (1, 2, 3):
        x, y = batch()
        out = head(x, y)
        expected = function(x.double(), weight.double(), y, 3, steep().value(step))
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_step_by_hand() -> None:
    schedule = LambdaSchedule(10.0, 0.5, 2.0, auto_step=False)
    head = LSoftmaxLoss(6, 5, lam=schedule)
    head(*batch())
    assert schedule.steps == 0
    schedule.step()
    assert head.lam == schedule.lam
    assert schedule.steps == 1


def test_defaults_are_the_documented_ones() -> None:
    schedule = LSoftmaxLoss(6, 5).schedule
    assert repr(schedule) == repr(LambdaSchedule.by_angle())
    assert (schedule.base, schedule.minimum, schedule.keep) == (1000.0, 0.5, 0.5)


def test_lam_keeps_its_bits_when_the_layer_changes_type() -> None:
    for lam in (steep(), 0.1):
        head = LSoftmaxLoss(6, 5, lam=lam)
        head(*batch())
        before = head.lam.clone()
        for changed in (head.half(), head.double(), head.bfloat16()):
            assert changed.lam.dtype == torch.float32
            assert torch.equal(changed.lam, before)


# ---- state ---------------------------------------------------------------------------------------


def test_resumed_is_never_stopped() -> None:
    """Losses of a run saved to a file and resumed in fresh objects, bit for bit."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"body": nn.Linear(4, 6), "head": LSoftmaxLoss(6, 5, lam=steep())})
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    data = [(torch.randn(8, 4), torch.randint(5, (8,))) for _ in range(10)]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> list[float]:
        losses = []
        for x, y in data[part]:
            loss = model["head"](model["body"](x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    straight = train(*build(), slice(0, 10))
    model, optimizer = build()
    first = train(model, optimizer, slice(0, 5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer = build()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert first + train(model, optimizer, slice(5, 10)) == straight


def test_exchange_with_linear_cross_entropy_loss() -> None:
    theirs_class = getattr(nn, "LinearCrossEntropyLoss", None)
    if theirs_class is None:
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    weight = torch.rand(5)
    for options in ({}, {"weight": weight}):
        theirs, x_y = theirs_class(6, 5, **options), batch()
        ours = LSoftmaxLoss(6, 5, margin=1, lam=0.0, **options)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(*x_y), theirs(*x_y))
        back = theirs_class(6, 5, **options)
        back.load_state_dict(ours.state_dict())
        assert torch.equal(back.linear.weight, theirs.linear.weight)
    annealed = LSoftmaxLoss(6, 5)
    annealed.load_state_dict(theirs_class(6, 5).state_dict())  # strict
    assert annealed.schedule.steps == 0
    result = theirs_class(6, 5).load_state_dict(annealed.state_dict(), strict=False)
    assert result.missing_keys == []
    assert set(result.unexpected_keys) == {"schedule.steps", "schedule.lam", "schedule.share"}


def test_exchange_with_linear() -> None:
    plain = nn.Linear(6, 5, bias=False)
    head = LSoftmaxLinear(6, 5)
    head.load_state_dict(plain.state_dict())
    x, _ = batch()
    assert torch.equal(head(x), plain(x))
    constant = LSoftmaxLinear(6, 5, lam=0.5)
    plain.load_state_dict(constant.state_dict())
    assert torch.equal(plain.weight, constant.weight)
    assert isinstance(head, nn.Linear)


def test_a_wrong_checkpoint_is_refused() -> None:
    state = LSoftmaxLoss(6, 5).state_dict()
    del state["schedule.lam"]
    with pytest.raises(RuntimeError, match=r"schedule\.lam"):
        LSoftmaxLoss(6, 5).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        LSoftmaxLoss(6, 4).load_state_dict(LSoftmaxLoss(6, 5).state_dict())


def test_loading_does_not_change_the_checkpoint() -> None:
    state = nn.Linear(6, 5, bias=False).state_dict()
    LSoftmaxLinear(6, 5).load_state_dict(state)
    assert list(state) == ["weight"]


def test_copies_are_apart() -> None:
    head = LSoftmaxLoss(6, 5, lam=steep())
    other = copy.deepcopy(head)
    head(*batch())
    assert head.schedule.steps == 1
    assert other.schedule.steps == 0


def test_annealing_begins_again_in_place() -> None:
    """Red if the numbers are others': lam was handed out, memory is shared, graphs captured it."""
    schedule = LambdaSchedule(100.0, 0.5, 2.0)
    head = LSoftmaxLoss(6, 5, lam=schedule).share_memory()
    lam, buffers = head.lam, [buffer.data_ptr() for buffer in schedule.buffers()]
    x, y = batch()
    for _ in range(3):
        head(x, y)
    assert lam < 100
    with torch.inference_mode():
        schedule.reset_parameters()
    assert [lam.item(), schedule.steps.item()] == [100.0, 0]
    assert schedule.share.item() == pytest.approx(1 / 101)
    head(x, y)
    assert lam is head.lam
    assert buffers == [buffer.data_ptr() for buffer in schedule.buffers()]


def test_new_class_vectors_begin_annealing() -> None:
    """Red if LSoftmaxLinear.reset_parameters() is nn.Linear's alone: its margin would lose them."""
    head = LSoftmaxLinear(6, 5, lam=LambdaSchedule(100.0, 0.5, 2.0))
    x, y = batch()
    for _ in range(3):
        head(x, y)
    weight = head.weight.clone()
    head.reset_parameters()
    assert (head.weight != weight).any()
    assert [head.lam.item(), head.schedule.steps.item()] == [100.0, 0]


def test_what_torchs_layers_may_be_told() -> None:
    loss = LSoftmaxLoss(6, 5, ignore_index=None, bias=False)
    assert (loss.in_features, loss.num_classes) == (6, 5)
    assert loss.ignore_index == -100
    assert loss.linear.bias is None
    assert LSoftmaxLinear(6, 5, bias=False).bias is None
    x, y = batch()
    y[0] = -100
    assert lsoftmax.functional.lsoftmax_loss(x, loss.linear.weight, y, ignore_index=None)


@pytest.mark.parametrize("lam", [None, 3.0])
def test_made_on_the_meta_device(lam: float | None) -> None:
    """Sharded training makes models there: to_empty() must not leave garbage for lam."""
    head = LSoftmaxLoss(6, 5, lam=lam, device="meta", weight=torch.ones(5))
    assert {tensor.device.type for tensor in [*head.parameters(), *head.buffers()]} == {"meta"}
    assert head(torch.empty(2, 6, device="meta"), torch.empty(2, device="meta").long()).is_meta
    head.to_empty(device="cpu")
    assert head.schedule.steps == 0
    assert float(head.lam) == (lam or 1000.0)
    assert head.lam.dtype == torch.float32


# ---- the layers ----------------------------------------------------------------------------------


def test_loss_options_reach_the_function() -> None:
    x, y = batch()
    y[0] = -1
    weight = torch.rand(5)
    options = {"weight": weight, "ignore_index": -1, "label_smoothing": 0.2}
    for reduction in ("mean", "sum", "none"):
        head = LSoftmaxLoss(6, 5, margin=1, lam=0.0, reduction=reduction, **options)
        expected = F.cross_entropy(head.linear(x), y, reduction=reduction, **options)
        torch.testing.assert_close(head(x, y), expected)


def test_inference_is_plain_logits() -> None:
    x, _ = batch()
    head = LSoftmaxLoss(6, 5).eval()
    assert torch.equal(head.linear(x), F.linear(x, head.linear.weight))
    assert LSoftmaxLinear(6, 5)(torch.randn(2, 3, 6)).shape == (2, 3, 5)


def test_dtype_and_repr() -> None:
    head = LSoftmaxLoss(6, 5, margin=3, lam=0.5, dtype=torch.float64)
    assert head.linear.weight.dtype == torch.float64
    assert "margin=3" in repr(head)
    assert "0.5" in repr(head)
    assert "margin=4" in repr(LSoftmaxLinear(6, 5))


def test_public_names() -> None:
    for name in lsoftmax.__all__:
        assert getattr(lsoftmax, name) is not None
    assert isinstance(lsoftmax.cuda_available(), bool)
