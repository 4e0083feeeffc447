"""Schedules that need no tuning: a curve as long as the training, and the hold of the angle."""

from __future__ import annotations

import copy
import math
import pickle
import statistics

import numpy as np
import pytest
import torch

from lsoftmax import LambdaSchedule, LSoftmaxLinear, LSoftmaxLoss, functional


@pytest.mark.parametrize("total", [1, 2, 20, 600, 50_000, np.int64(1_000_000)])
def test_falls_from_softmax_to_the_floor_within_the_training(total: int) -> None:
    """Red if the curve is counted in anything but the length of the training."""
    schedule = LambdaSchedule.for_steps(total)
    assert schedule.value(0) == 1000
    before, after = math.floor(0.29 * total), math.ceil(0.301 * total)
    assert schedule.value(before) > schedule.minimum
    assert schedule.value(after) == schedule.minimum == 0.5
    assert schedule.value(total) == schedule.minimum


def test_curves_of_two_lengths_are_one() -> None:
    short, long = LambdaSchedule.for_steps(100), LambdaSchedule.for_steps(10_000)
    for step in range(101):
        assert short.value(step) == pytest.approx(long.value(100 * step), rel=1e-9)


def test_the_buffers_follow_the_formula() -> None:
    """lam of the buffer, step by step, against the closed form written out here."""
    total, minimum = int(torch.randint(5, 60, ())), 0.1 + float(torch.rand(()))
    schedule = LambdaSchedule.for_steps(total, minimum=minimum, keep=None)
    slope = ((1000 / minimum) ** 0.25 - 1) / (0.3 * total)
    for step in range(1, total + 5):
        schedule.step()
        expected = max(minimum, 1000 / (1 + slope * step) ** 4)
        assert float(schedule.lam) == pytest.approx(expected, rel=1e-6)


def allowed(cosine: float, margin: int, keep: float) -> float:
    """The smallest lam for which the target's logit keeps its share: bisection on the condition."""
    psi = 1 - 2 * margin * math.acos(cosine) / math.pi
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        keeps = (middle * cosine + psi) / (1 + middle) >= keep * cosine
        low, high = (low, middle) if keeps else (middle, high)
    return high


@pytest.mark.parametrize("margin", [2, 3, 4, 8])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.8])
def test_lam_is_held_where_the_angle_is_wide(margin: int, keep: float) -> None:
    for degrees in (5, 20, 45, 70, 85):
        schedule = LambdaSchedule(0.25, 0.0, 0.0, keep=keep)
        cosine = math.cos(math.radians(degrees))
        for _ in range(300):  # longer than the running mean remembers
            schedule.observe(torch.tensor(cosine), margin)
        schedule.step()
        expected = max(0.25, allowed(cosine, margin, keep))
        assert float(schedule.lam) == pytest.approx(expected, rel=1e-3)


def test_held_lam_is_never_below_the_curve() -> None:
    schedule, curve = LambdaSchedule.for_steps(40), LambdaSchedule.for_steps(40, keep=None)
    for _ in range(40):
        schedule.observe(torch.rand(()), 4)
        schedule.step()
        curve.step()
        assert schedule.lam >= curve.lam
    assert schedule.lam > curve.lam, "a cosine near 0.5 holds lam up"


@pytest.mark.parametrize("cosine", [0.0, -0.3, math.nan])
@pytest.mark.parametrize("margin", [1, 4])
def test_no_angle_means_softmax(cosine: float, margin: int) -> None:
    """Half-precision features may overflow in one batch: that must not stay in the running mean."""
    schedule = LambdaSchedule.by_angle()
    for _ in range(50):
        schedule.observe(torch.tensor(cosine), margin)
        schedule.step()
    assert float(schedule.lam) == pytest.approx(1000, rel=1e-3)
    for _ in range(300):
        schedule.observe(torch.tensor(1.0), 4)
        schedule.step()
    assert float(schedule.lam) == 0.5


def test_without_keep_nothing_is_measured() -> None:
    schedule = LambdaSchedule(10.0, 0.5, 2.0)
    for steps in range(3):
        schedule.observe(torch.tensor(0.9), 4)
        assert float(schedule.share) == pytest.approx(1 / (1 + schedule.value(steps)))
        schedule.step()


def test_what_is_no_lam_and_no_cosine_changes_nothing() -> None:
    schedule = LambdaSchedule.by_angle()
    for wrong in (torch.randn(3), "a", None, -1.0):
        with pytest.raises((TypeError, ValueError), match="lam: expected"):
            schedule.commit(wrong)
    for wrong in (0.5, torch.randn(3), torch.tensor(1)):
        with pytest.raises(TypeError, match="cosine: expected a 0-dim float tensor"):
            schedule.observe(wrong, 4)
    assert schedule.steps == 0
    assert schedule.share == 0


def test_a_lam_with_a_gradient_leaves_it_behind() -> None:
    schedule = LambdaSchedule(10.0, 0.5, 2.0)
    schedule.commit(torch.tensor(3.0, requires_grad=True))
    assert schedule.lam == 3
    assert not schedule.lam.requires_grad


@pytest.mark.parametrize("layer", [LSoftmaxLoss, LSoftmaxLinear])
def test_layers_measure_their_own_batch(layer: type) -> None:
    head = layer(6, 5, margin=3, lam=LambdaSchedule.by_angle(), dtype=torch.float64)
    weight = head.linear.weight if layer is LSoftmaxLoss else head.weight
    y = torch.randint(5, (16,))
    x = weight.detach()[y] + 0.3 * weight.detach().norm(dim=1).mean() * torch.randn(16, 6).double()
    cosines = [
        float((a @ b) / (a.norm() * b.norm())) for a, b in zip(x, weight.detach()[y], strict=True)
    ]
    low = statistics.mean(cosines) - statistics.pstdev(cosines)
    keep = head.schedule.keep
    expected = 0.1 / (1 + allowed(low, 3, keep))  # a tenth: of the running mean
    head(x, y)
    assert float(head.schedule.share) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        head(x, y)
    head.eval()(x, y)
    assert float(head.schedule.share) == pytest.approx(expected, rel=1e-4)


def test_ignored_rows_have_no_angle() -> None:
    heads = [LSoftmaxLoss(6, 5, ignore_index=ignore) for ignore in (-100, 3, -100)]
    x, y = heads[0].linear.weight.detach()[:4] + 0.01 * torch.randn(4, 6), torch.arange(4)
    for head in heads[1:]:
        head.load_state_dict(heads[0].state_dict())
    heads[0](x, torch.where(y == 3, -100, y))
    heads[1](x, y)
    heads[2](x[:3], y[:3])
    for head in heads[1:]:
        torch.testing.assert_close(head.schedule.share, heads[0].schedule.share)
    before = heads[0].schedule.share.clone()
    heads[0](x, torch.full((4,), -100))
    heads[0](x[:0], y[:0])
    assert heads[0].schedule.share == before, "no row says nothing of the angle"


@pytest.mark.parametrize("keep", [0.6, None])
def test_a_resumed_schedule_goes_on_bit_for_bit(keep: float | None) -> None:
    straight, first, resumed = (LambdaSchedule.for_steps(100, keep=keep) for _ in range(3))
    cosines = torch.rand(20)
    for schedule, part in ((straight, cosines), (first, cosines[:11])):
        for cosine in part:
            schedule.observe(cosine, 4)
            schedule.step()
    resumed.load_state_dict(first.state_dict())
    for cosine in cosines[11:]:
        resumed.observe(cosine, 4)
        resumed.step()
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_running_mean_keeps_its_bits_when_the_layer_changes_type() -> None:
    head = LSoftmaxLoss(6, 5)
    x = head.linear.weight.detach() + 0.05 * torch.randn(5, 6)
    head(x, torch.arange(5))
    before = head.schedule.share.clone()
    assert before > 0
    assert torch.equal(head.half().schedule.share, before)


def test_steps_by_hand_are_the_only_ones_that_the_loss_sees() -> None:
    head = LSoftmaxLoss(6, 5, lam=LambdaSchedule(10.0, 1.0, 2.0, auto_step=False))
    x, y = torch.randn(8, 6), torch.randint(5, (8,))
    for _ in range(3):
        expected = functional.lsoftmax_loss(x, head.linear.weight, y, 4, head.lam.clone())
        assert torch.equal(head(x, y), expected)
        assert torch.equal(head(x, y), expected)
        head.schedule.step()


def test_steps_by_hand() -> None:
    """As activation checkpointing of the head needs it: lam stays put between steps."""
    schedule = LambdaSchedule.by_angle(auto_step=False)
    head = LSoftmaxLoss(6, 5, lam=schedule)
    lams = set()
    for _ in range(2):
        head(head.linear.weight.detach(), torch.arange(5))
        lams.add(float(schedule.lam))
    assert schedule.steps == 0
    assert lams == {1000.0}
    for _ in range(60):
        head(head.linear.weight.detach(), torch.arange(5))
        schedule.step()
    assert float(schedule.lam) == 0.5


@pytest.mark.parametrize("total", [0, -3])
def test_too_few_steps(total: int) -> None:
    with pytest.raises(ValueError, match=rf"total_steps: expected an integer >= 1, got {total}"):
        LambdaSchedule.for_steps(total)


@pytest.mark.parametrize("total", [10.0, "10", True, None])
def test_steps_are_an_integer(total: object) -> None:
    with pytest.raises(TypeError, match="total_steps: expected an integer >= 1"):
        LambdaSchedule.for_steps(total)


@pytest.mark.parametrize("minimum", [0, -1.0, 1000, math.nan, math.inf])
def test_the_floor_is_above_zero_and_below_the_start(minimum: float) -> None:
    with pytest.raises(ValueError, match="minimum: expected"):
        LambdaSchedule.for_steps(10, minimum=minimum)


@pytest.mark.parametrize(
    ("keep", "error"), [(1.0, ValueError), (-0.1, ValueError), ("1", TypeError)]
)
def test_the_share_kept_is_below_one(keep: object, error: type) -> None:
    with pytest.raises(error, match="keep: expected"):
        LambdaSchedule.for_steps(10, keep=keep)


@pytest.mark.parametrize("layer", [LSoftmaxLoss, LSoftmaxLinear])
def test_a_schedule_of_another_layer_is_warned_of(layer: type) -> None:
    """Made outside a loop over seeds, it would begin each training where the last one ended."""
    schedule = LambdaSchedule.for_steps(10)
    first = layer(4, 3, lam=schedule)
    with pytest.warns(UserWarning, match="belongs to another layer already") as warned:
        layer(4, 3, lam=schedule)
    assert warned[0].filename == __file__, "who is to blame"
    copies = copy.deepcopy(schedule), copy.deepcopy(first).schedule
    for lam in (*copies, pickle.loads(pickle.dumps(schedule))):  # warnings are errors
        layer(4, 3, lam=lam)
    constant, by_hand = LambdaSchedule.constant(2.0), LambdaSchedule.by_angle(auto_step=False)
    for lam in (constant, constant, by_hand, by_hand):  # which nothing advances
        layer(4, 3, lam=lam)
