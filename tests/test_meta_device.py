"""Layers made on the meta device, and the ways that they come by their numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from annealed import LAYERS, batch, constant, counted, curve, held, trained
from lsoftmax import LambdaSchedule, LSoftmaxLoss


def under_meta(schedule: LambdaSchedule | float) -> LSoftmaxLoss:
    with torch.device("meta"):
        return LSoftmaxLoss(6, 5, margin=3, lam=schedule)


@pytest.mark.parametrize("schedule", [curve, held, counted, constant])
@pytest.mark.parametrize("layer", LAYERS)
def test_loaded_by_assignment(layer: type, schedule) -> None:
    """A model made on the meta device takes the checkpoint's tensors as they are; what is in no
    checkpoint must not stay behind.
    """
    head = trained(layer, schedule())
    with torch.device("meta"):
        other = layer(6, 5, margin=3, lam=schedule())
    other.load_state_dict(head.state_dict(), assign=True)
    assert not [name for name, each in other.named_buffers() if each.is_meta]
    other = other.to("cpu")
    x, y = batch(head)
    assert torch.equal(copy.deepcopy(head)(x, y), other(x, y))


def test_a_16_bit_checkpoint_loaded_by_assignment() -> None:
    """The schedule's numbers stay float32, which the ops expect and a running mean needs."""
    state = trained(LSoftmaxLoss, held()).state_dict()
    halves = {key: v.bfloat16() if v.is_floating_point() else v for key, v in state.items()}
    head = under_meta(held())
    head.load_state_dict(halves, assign=True)
    assert head.linear.weight.dtype == torch.bfloat16
    assert {head.lam.dtype, head.schedule.share.dtype} == {torch.float32}
    x, y = batch(head)
    head(x.bfloat16(), y).backward()
    assert head.schedule.steps == 4


@pytest.mark.parametrize("layer", LAYERS)
def test_a_device_of_its_own_among_others_on_meta(layer: type) -> None:
    """What is given counts, as for nn.Linear; the schedule has its first values there."""
    with torch.device("meta"):
        head = layer(6, 5, lam=held(), device="cpu")
    assert not any(each.is_meta for each in (*head.parameters(), *head.buffers()))
    assert head.lam == held().lam
    head(*batch(head))
    assert head.schedule.steps == 1


def assigned(head: nn.Module, state: dict[str, Tensor], junk: float = 77) -> nn.Module:
    """As transformers' from_pretrained fills a model made on the meta device: by setattr, with junk
    in what is in no checkpoint.
    """
    for module, own in ((head.linear, "linear."), (head.schedule, "schedule.")):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            memory = torch.full((), junk, dtype=tensor.dtype).expand(tensor.shape).clone()
            value = state.get(own + name, memory)
            setattr(module, name, nn.Parameter(value) if own == "linear." else value)
    return head


@pytest.mark.parametrize("schedule", [curve, held, counted, constant])
@pytest.mark.parametrize("steps", [1, 40])
def test_filled_by_assignment_of_attributes(schedule, steps: int) -> None:
    """A schedule that was in the checkpoint goes on; of a constant there is nothing to load."""
    head = trained(LSoftmaxLoss, schedule(), steps=steps)
    x, y = batch(head)
    state = head.state_dict()
    empty = under_meta(schedule())
    for again in (empty, copy.deepcopy(empty).eval()):
        other = assigned(again, copy.deepcopy(state))
        expected = copy.deepcopy(head).train(other.training)
        assert torch.equal(other(x, y), expected(x, y))
        assert torch.equal(other.schedule.steps, expected.schedule.steps)


@pytest.mark.parametrize("now", [lambda: LambdaSchedule.for_steps(10_000), held])
def test_numbers_of_another_schedule_are_numbers(now) -> None:
    """However far below the curve of the new one, or set by hand; and the end of the authors'."""
    steep, by_hand = LambdaSchedule(1000.0, 0.1, 45.0), LambdaSchedule(9.0, 0.1, 1.0)
    by_hand.commit(5.0)
    for schedule, steps in ((curve(), 40), (steep, 200), (by_hand, 0)):
        state = trained(LSoftmaxLoss, schedule, steps).state_dict()
        empty = under_meta(now())
        loaded = copy.deepcopy(empty)
        loaded.load_state_dict(copy.deepcopy(state), assign=True)
        for other in (loaded, assigned(empty, copy.deepcopy(state))):
            other(*batch(other))
            assert other.schedule.steps == state["schedule.steps"] + 1


def test_a_compiled_layer_looks_at_its_numbers() -> None:
    """Red if one from the meta device trains with junk because its first call is compiled."""
    state = {"linear.weight": torch.randn(5, 6)}
    x, y = torch.randn(4, 6), torch.arange(4)
    for schedule in (constant, held):
        head = under_meta(schedule())
        compiled = torch.compile(assigned(head, state), backend="eager")
        if schedule is held:
            with pytest.raises(RuntimeError, match="are of no schedule"):
                compiled(x, y)
            head.schedule.reset_parameters()
        expected = LSoftmaxLoss(6, 5, margin=3, lam=schedule())
        expected.load_state_dict(state)
        assert compiled(x, y) == expected(x, y)


def test_a_skeleton_on_the_meta_device_is_called_with_others_numbers() -> None:
    """As an ensemble is, by functional_call under vmap, where nothing can be looked at."""
    heads = [trained(LSoftmaxLoss, curve()).eval() for _ in range(3)]
    skeleton = under_meta(curve()).eval()
    x, y = torch.randn(4, 6), torch.arange(4)
    state = torch.func.stack_module_state(heads)
    call = torch.func.vmap(lambda p, b: torch.func.functional_call(skeleton, (p, b), (x, y)))
    torch.testing.assert_close(call(*state), torch.stack([head(x, y) for head in heads]))


def given_meta(schedule: LambdaSchedule | float) -> LSoftmaxLoss:
    return LSoftmaxLoss(6, 5, margin=3, lam=schedule, device="meta")


def moved_to_meta(schedule: LambdaSchedule | float) -> LSoftmaxLoss:
    return LSoftmaxLoss(6, 5, margin=3, lam=schedule).to("meta")


@pytest.mark.parametrize("made", [under_meta, given_meta, moved_to_meta])
@pytest.mark.parametrize("schedule", [curve, held, counted])
def test_junk_for_numbers_is_refused(made, schedule) -> None:
    """Where the layer is used, in training and out of it, until it is reset."""
    state = {"linear.weight": torch.randn(5, 6)}
    head = made(schedule())
    x, y = torch.randn(4, 6), torch.arange(4)
    for training, junk in ((True, 77), (False, 77), (True, 0)):
        other = assigned(copy.deepcopy(head), state, junk).train(training)
        for _ in range(2):
            message = rf"steps = {junk}, lam = {junk}.*reset_parameters\(\)"
            with pytest.raises(RuntimeError, match=message):
                other(x, y)
        other.schedule.reset_parameters()
        other(x, y)
        assert other.schedule.steps == int(training)


@pytest.mark.parametrize("junk", [77, 0, math.nan])
def test_junk_for_classes_that_were_not_counted(junk: float) -> None:
    """A schedule that counted none is in the checkpoint: it goes on, and counting begins."""
    head = trained(LSoftmaxLoss, held())
    x, y = batch(head)
    filled = {**head.state_dict(), "schedule.class_cosines": torch.full((2, 5), float(junk))}
    other = assigned(under_meta(counted()), filled)
    expected = LSoftmaxLoss(6, 5, margin=3, lam=counted())
    expected.load_state_dict(head.state_dict())
    for layer in (other, expected):
        layer(x, y)
    for name, number in expected.schedule.named_buffers():
        assert torch.equal(getattr(other.schedule, name), number), name


@pytest.mark.parametrize("schedule", [curve, held, counted, constant])
@pytest.mark.parametrize("layer", LAYERS)
def test_made_empty_and_reset(layer: type, schedule) -> None:
    """As sharded training does it: every module of its own numbers has reset_parameters()."""
    with torch.device("meta"):
        head = layer(6, 5, margin=3, lam=schedule())
    head.to_empty(device="cpu")
    for buffer in head.buffers():
        buffer.fill_(7)  # what an uninitialised one may hold
    for parameter in head.parameters():
        nn.init.constant_(parameter, torch.nan)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = schedule()
    for name, number in fresh.named_buffers():
        assert torch.equal(getattr(head.schedule, name), number)
    assert all(parameter.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("made", [under_meta, given_meta, moved_to_meta])
def test_a_constant_needs_no_numbers(made) -> None:
    head = assigned(made(0.75), {"linear.weight": torch.randn(5, 6)}, junk=77)
    head(torch.randn(4, 6), torch.arange(4))
    assert head.lam == 0.75


@pytest.mark.parametrize("schedule", [curve, held, counted, constant])
def test_made_empty_in_another_type(schedule) -> None:
    head = given_meta(schedule())
    head._apply(lambda t: torch.full_like(t, 7, device="cpu", dtype=torch.float16))
    fresh = schedule()
    for name, number in head.schedule.named_buffers():
        assert number.dtype == getattr(fresh, name).dtype
        assert torch.equal(number, getattr(fresh, name))


@pytest.mark.parametrize("schedule", [curve, held, counted, constant])
def test_a_real_layer_made_empty_keeps_its_numbers(schedule, monkeypatch) -> None:
    """Red if lam is whatever was in the memory: torch fills it with NaN, asked to be repeatable."""
    head = trained(LSoftmaxLoss, schedule(), steps=3)
    before = {name: number.clone() for name, number in head.schedule.named_buffers()}
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        head.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert head.linear.weight.isnan().all()
    assert all(torch.equal(number, before[name]) for name, number in head.schedule.named_buffers())
