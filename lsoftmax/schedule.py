"""Annealing: how much of the plain logit is left in the target's logit as training goes on."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LambdaSchedule"]

# Settled by docs/training.md. lam at the start, where every margin is plain softmax; what `keep` is
# unless given; and of for_steps the curve's power and the share of the steps that it falls in.
_BASE, _KEEP, _POWER, _FRACTION = 1000.0, 0.6, 4.0, 0.3
_MEMORY = 0.9  # of the running mean over batches


class LambdaSchedule(nn.Module):
    r"""Caffe's rule for the annealing weight, as the authors trained.

    .. math:: \lambda(t) = \max(\mathrm{minimum},\ \mathrm{base}\,(1 + \gamma t)^{-\mathrm{power}})

    t counts training steps from 1; before the first step lam is ``base``. The count and lam are
    buffers: ``state_dict()`` carries them, a resumed run continues the same curve, and lam is
    updated in place on its device, without synchronising it (source: the authors'
    ``largemargin_inner_product`` layer).

    With ``keep`` the curve is held up where the features are still far from their classes. There
    psi is negative, a target's logit grows as its feature and class vector shrink, and shrink they
    do, to zero: the class is lost. At the mean angle theta of the batches so far, the target's
    logit is to keep at least this share of what softmax gives it:

    .. math:: \frac{\lambda \cos\theta + \psi}{1 + \lambda} \ge \mathrm{keep}\,\cos\theta
              \iff
              \frac{1}{1 + \lambda} \le (1 - \mathrm{keep})\,\frac{\cos\theta}{\cos\theta - \psi}

    with psi = 1 - 2 m theta / pi, which it is at every half bucket. The layer measures the angle
    after each training step, so lam follows a step later.

    A schedule belongs to one layer: two that share it would each advance it. Under activation
    checkpointing of the layer itself, which runs its forward twice, use ``auto_step=False``.

    Args:
        base: lam before the first step, >= 0.
        gamma: how fast lam falls per step, >= 0.
        power: exponent, >= 0.
        minimum: lam never falls below it, >= 0.
        keep: in [0, 1), or None for the curve alone, as the authors trained.
        auto_step: let the layer advance the schedule by one on each training forward with gradients
            enabled and a target. With False, call :meth:`step` yourself, once a training step
            (gradient accumulation, say).

    Attributes:
        steps: 0-dim int64 buffer, training steps taken.
        lam: 0-dim float32 buffer, the current value.
        share: 0-dim float32 buffer, 1 / (1 + lam) that the angles so far allow; of use to ``keep``.

    Raises:
        TypeError: a parameter is not a number.
        ValueError: a parameter is negative or not finite, or ``keep`` is not below 1.
    """

    steps: Tensor
    lam: Tensor
    share: Tensor

    def __init__(
        self,
        base: float,
        gamma: float,
        power: float,
        minimum: float = 0.0,
        *,
        keep: float | None = None,
        auto_step: bool = True,
    ) -> None:
        super().__init__()
        parameters = {"base": base, "gamma": gamma, "power": power, "minimum": minimum}
        for name, value in parameters.items():
            _check_number(name, value)
        if keep is not None:
            _check_number("keep", keep)
            if keep >= 1:
                raise ValueError(f"keep: expected in [0, 1), got {keep}")
        self.base, self.gamma = float(base), float(gamma)
        self.power, self.minimum = float(power), float(minimum)
        self.keep = keep
        self.auto_step = auto_step
        # A constant is configuration, not state: it is not saved, so that the state_dict of a layer
        # with a constant lam is that of the plain layer.
        changes, held = not self.is_constant, keep is not None
        lam = torch.tensor(self.value(0), dtype=torch.float32)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=changes)
        self.register_buffer("lam", lam, persistent=changes)
        self.register_buffer("share", torch.zeros_like(lam), persistent=held)

    @classmethod
    def constant(cls, lam: float) -> LambdaSchedule:
        """The schedule that stays at ``lam``."""
        return cls(base=lam, gamma=0.0, power=0.0)

    @classmethod
    def for_steps(
        cls,
        total_steps: int,
        *,
        minimum: float = 0.5,
        keep: float | None = _KEEP,
        auto_step: bool = True,
    ) -> LambdaSchedule:
        """The schedule for a training of ``total_steps``: from 1000, where every margin is plain
        softmax, to ``minimum`` after 30% of the steps, and held up where the data need it.

        The classes must lie apart before the margin pulls each together, and that takes a share of
        the training rather than a number of steps. ``docs/training.md`` compares it with others.

        Args:
            total_steps: training steps (of the optimizer, not epochs) of the whole run, >= 1. A
                resumed run is given the same number again.
            minimum: lam at the end, in (0, 1000): smaller narrows the classes more.
            keep, auto_step: as for :class:`LambdaSchedule`.

        Raises:
            TypeError: ``total_steps`` is no integer, or another argument no number.
            ValueError: ``total_steps`` < 1, ``minimum`` outside (0, 1000), ``keep`` outside [0, 1).
        """
        if isinstance(total_steps, bool) or not hasattr(total_steps, "__index__"):
            kind = type(total_steps).__name__
            raise TypeError(f"total_steps: expected an integer >= 1, got {kind} ({total_steps!r})")
        if operator.index(total_steps) < 1:
            raise ValueError(f"total_steps: expected an integer >= 1, got {total_steps}")
        _check_number("minimum", minimum)
        if not 0 < minimum < _BASE:
            raise ValueError(f"minimum: expected in (0, {_BASE:g}), got {minimum}")
        annealed = _FRACTION * operator.index(total_steps)
        gamma = ((_BASE / minimum) ** (1 / _POWER) - 1) / annealed
        return cls(_BASE, gamma, _POWER, minimum, keep=keep, auto_step=auto_step)

    @classmethod
    def by_angle(
        cls, *, minimum: float = 0.5, keep: float = _KEEP, auto_step: bool = True
    ) -> LambdaSchedule:
        """The schedule that needs no number of steps: lam is what the measured angle allows.

        From 1000 its curve is at ``minimum`` within some fifty steps; from then on ``keep`` alone
        decides. Arguments and errors are those of :class:`LambdaSchedule`.
        """
        return cls(_BASE, 1.0, 2.0, minimum, keep=keep, auto_step=auto_step)

    @property
    def is_constant(self) -> bool:
        """Whether lam never changes."""
        return self.keep is None and (self.gamma == 0 or self.power == 0)

    def value(self, step: int) -> float:
        """The curve after ``step`` training steps, as a Python float: for plots and logs. lam is
        this, or with ``keep`` at least this.
        """
        return max(self.minimum, self.base * (1 + self.gamma * step) ** -self.power)

    @torch.no_grad()
    def upcoming(self) -> Tensor:
        """lam of the next training step, a 0-dim float32 tensor; changes nothing."""
        # float64: (1 + 1e-5 t)^-45 would lose the annealing's last digits in float32
        decay = (self.steps + 1).double().mul_(self.gamma).add_(1).pow_(-self.power)
        lam = decay.mul_(self.base).clamp_(min=self.minimum)
        if self.keep is not None:
            share = self.share.double().clamp_(min=1 / (1 + _BASE))
            lam = torch.maximum(lam, share.reciprocal_().sub_(1))
        return lam.float()

    @torch.no_grad()
    def commit(self, lam: Tensor) -> None:
        """Take the step whose lam is ``lam`` (from :meth:`upcoming`), in place."""
        self.steps.add_(1)
        self.lam.copy_(lam)

    @torch.no_grad()
    def observe(self, cosine: Tensor, margin: int) -> None:
        """Take in, for ``keep``, the mean cosine between a batch's features and their classes.

        Args:
            cosine: 0-dim float tensor on the schedule's device; NaN counts as 0, no angle at all.
            margin: of the layer.
        """
        if self.keep is None:
            return
        cosine = cosine.float().nan_to_num(nan=0.0).clamp_(0, 1)
        taken = cosine - 1 + 2 * margin / math.pi * cosine.acos()  # cos - psi
        share = (1 - self.keep) * cosine / taken.clamp_(min=1e-6)
        self.share.lerp_(share.clamp_(max=1), 1 - _MEMORY)

    def step(self) -> None:
        """Advance by one training step, in place, without synchronising the device."""
        self.commit(self.upcoming())

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        if self.is_constant:
            return f"{self.value(0):g}"
        return (
            f"base={self.base:g}, gamma={self.gamma:g}, power={self.power:g}, "
            f"minimum={self.minimum:g}" + ("" if self.keep is None else f", keep={self.keep:g}")
        )

    def _apply(self, fn: Any, recurse: bool = True) -> LambdaSchedule:
        """Module.to(), half() and so on: the device changes, numbers keep float32's bits."""
        before = {"lam": self.lam, "share": self.share}
        super()._apply(fn, recurse)
        if before["lam"].is_meta and not self.lam.is_meta:  # to_empty(): no numbers to move
            self.reset_parameters()
        elif self.lam.dtype != torch.float32:
            for name, number in before.items():
                setattr(self, name, number.to(self.steps.device))
        return self

    def reset_parameters(self) -> None:
        """Back to before the first step; a schedule made on the meta device begins here."""
        self.steps = torch.zeros_like(self.steps)
        self.lam = torch.full_like(self.steps, self.value(0), dtype=torch.float32)
        self.share = torch.zeros_like(self.lam)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accepts a checkpoint of a layer without annealing: training then starts on this curve."""
        state = {prefix + name: value for name, value in self.state_dict().items()}
        if not state.keys() & state_dict.keys():
            state_dict.update(state)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number >= 0, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
