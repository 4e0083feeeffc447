"""State on its way through files, copies, other versions and optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from annealed import LAYERS, batch, constant, counted, curve, held, trained
from lsoftmax import LSoftmaxLinear, LSoftmaxLoss


def saved(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [curve, held, counted, constant])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "copied",
    [
        lambda head: pickle.loads(pickle.dumps(head)),
        lambda head: saved(head, weights_only=False),
        copy.deepcopy,
    ],
    ids=["pickle", "save", "deepcopy"],
)
def test_a_copy_goes_on_alike_and_apart(copied, layer: type, schedule) -> None:
    head = trained(layer, schedule())
    other = copied(head)
    assert repr(other) == repr(head)
    for _ in range(2):
        x, y = batch(head)
        assert torch.equal(head(x, y), other(x, y))
    assert torch.equal(head.lam, other.lam)
    head(*batch(head))
    assert head.schedule.is_constant or other.schedule.steps == 5


@pytest.mark.parametrize("schedule", [curve, held, counted])
def test_a_schedule_alone(schedule) -> None:
    one = schedule()
    one.step()
    other = pickle.loads(pickle.dumps(one))
    one.step()
    other.step()
    assert repr(one) == repr(other)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("schedule", [curve, held, counted, constant])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_file_of_tensors_alone(layer: type, schedule) -> None:
    """weights_only=True refuses whatever is no tensor."""
    head, other = trained(layer, schedule()), layer(6, 5, margin=3, lam=schedule())
    other.load_state_dict(saved(head.state_dict(), weights_only=True))
    x, y = batch(head)
    assert torch.equal(head(x, y), other(x, y))
    assert torch.equal(head.lam, other.lam)


# ---- checkpoints of another schedule -------------------------------------------------------------


def test_a_checkpoint_from_before_keep_goes_on_at_its_lam() -> None:
    """Red where the share starts from nothing, which is lam = 1000 again. Older ones have none."""
    head = trained(LSoftmaxLoss, curve(), steps=40)
    state = head.state_dict()
    names = {"linear.weight", "schedule.steps", "schedule.lam"}
    assert set(state) == {*names, "schedule.share"}
    for saved in (state, {name: state[name] for name in names}):
        other = LSoftmaxLoss(6, 5, margin=3, lam=held())
        other.load_state_dict(saved)
        assert other.schedule.steps == 40
        torch.testing.assert_close(other.schedule.upcoming(), head.lam, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match=r"Missing key.*schedule\.lam"):
        other.load_state_dict({name: state[name] for name in names - {"schedule.lam"}})


def test_a_checkpoint_of_keep_goes_on_along_the_curve() -> None:
    head = trained(LSoftmaxLoss, held())
    other = LSoftmaxLoss(6, 5, margin=3, lam=curve())
    other.load_state_dict(head.state_dict())
    assert other.schedule.steps == 3
    assert other.schedule.upcoming() == pytest.approx(curve().value(4))


@pytest.mark.parametrize("schedule", [curve, held, counted])
@pytest.mark.parametrize("layer", LAYERS)
def test_class_vectors_without_annealing_begin_it(layer: type, schedule) -> None:
    """However far the layer was: a full margin on others' class vectors would lose them."""
    fresh, linear = schedule(), nn.Linear(6, 5, bias=False)
    plain = linear if layer is LSoftmaxLinear else nn.ModuleDict({"linear": linear})
    for before in (layer(6, 5, lam=0.5), plain):
        model = nn.ModuleDict({"head": trained(layer, schedule())})
        model.load_state_dict({f"head.{name}": w for name, w in before.state_dict().items()})
        for name in ("steps", "lam", "share"):
            assert torch.equal(getattr(model["head"].schedule, name), getattr(fresh, name))


@pytest.mark.parametrize(
    "part",
    [
        lambda model: model["body"].state_dict(prefix="body."),
        lambda model: {"module.head.linear.weight": torch.zeros(5, 6)},  # fits nothing
    ],
    ids=["another module's", "nobody's"],
)
def test_parts_that_are_loaded_change_no_annealing(part) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 6), "head": trained(LSoftmaxLoss, held())})
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict(part(model), strict=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model["head"].load_state_dict({"other": torch.zeros(1)}, strict=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("before", [curve, held])
def test_a_constant_refuses_an_annealing(before) -> None:
    """Strictly; without it, the class vectors are loaded."""
    state = trained(LSoftmaxLoss, before()).state_dict()
    head = LSoftmaxLoss(6, 5, margin=3, lam=constant())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*schedule\."):
        head.load_state_dict(state)
    result = head.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert set(result.unexpected_keys) == {"schedule.steps", "schedule.lam", "schedule.share"}
    assert torch.equal(head.linear.weight, state["linear.weight"])
    assert head.schedule.steps == 0


def test_a_type_for_all_leaves_the_count_an_integer() -> None:
    """float16 would count to 2048."""
    head = trained(LSoftmaxLoss, held()).type(torch.float16)
    assert head.linear.weight.dtype == torch.float16
    assert (head.schedule.steps.dtype, head.lam.dtype) == (torch.int64, torch.float32)
    assert head.schedule.steps == 3


# ---- optimizers ----------------------------------------------------------------------------------


def test_no_weight_decay_on_the_head() -> None:
    """Groups by name; the schedule is no parameter."""
    model = nn.ModuleDict({"body": nn.Linear(4, 6), "head": LSoftmaxLoss(6, 5)})
    names = [name for name, _ in model.named_parameters()]
    assert names == ["body.weight", "body.bias", "head.linear.weight"]
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[not name.startswith("head.")].append((name, parameter))
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": 0.1},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=0.5,
    )
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model["body"].weight, before["body"].weight * 0.95)
    assert torch.equal(model["head"].linear.weight, before["head"].linear.weight)


def test_scaled_gradients(device: str) -> None:
    """float16 with a GradScaler: the gradients of the training without one; a step whose gradients
    overflow is left out, and training goes on.
    """
    head = LSoftmaxLoss(16, 5, margin=4, lam=curve()).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    x, y = torch.randn(32, 16).to(device), torch.randint(5, (32,)).to(device)
    x.requires_grad_()
    twin = copy.deepcopy(head)
    with torch.autocast(device, torch.float16):
        scaler.scale(head(x, y)).backward()
        loss = twin(x.detach(), y)
    loss.backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(
        head.linear.weight.grad, twin.linear.weight.grad, rtol=1e-3, atol=1e-5
    )
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(head.linear.weight, twin.linear.weight)

    before = head.linear.weight.clone()
    scaler.update(2.0**40)
    for expected in (2.0**39, 2.0**38):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = head(x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(head.linear.weight, before)
        assert scaler.get_scale() == expected
    assert head.lam.isfinite()
