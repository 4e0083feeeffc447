"""Annealing: how much of the plain logit is left in the target's logit as training goes on."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import ops as ops  # defines what follows
from .checks import (
    check_device,
    check_margin,
    check_number,
    is_transformed,
    kind,
    lam_tensor,
    positive,
)
from .schedule_state import ScheduleState

__all__ = ["LambdaSchedule"]

_upcoming_op = torch.ops.lsoftmax.upcoming_lam.default
_anneal_op = torch.ops.lsoftmax.anneal_.default
_count_classes_op = torch.ops.lsoftmax.count_classes_.default

# Settled by docs/training.md. lam at the start, where every margin is plain softmax; what `keep` is
# unless given; and of for_steps the curve's power and the share of the steps that it falls in.
_BASE, _KEEP, _POWER, _FRACTION = 1000.0, 0.5, 4.0, 0.3
_MEMORY = 0.9  # of the running mean over batches
_CLASS_MEMORY = 0.7  # of a class's running means, over the batches that it is in


class LambdaSchedule(ScheduleState):
    r"""Caffe's rule for the annealing weight, as the authors trained.

    .. math:: \lambda(t) = \max(\mathrm{minimum},\ \mathrm{base}\,(1 + \gamma t)^{-\mathrm{power}})

    t counts training steps from 1; before the first step lam is ``base``. The count and lam are
    buffers: ``state_dict()`` carries them, a resumed run continues the same curve, and lam is
    updated in place on its device, without synchronising it (source: the authors'
    ``largemargin_inner_product`` layer).

    With ``keep`` the curve is held up where the features are still far from their classes. There
    psi is negative, a target's logit grows as its feature and class vector shrink, and shrink they
    do, to zero: the class is lost. The hardest rows and classes go first, so what counts is not the
    mean but the angle theta whose cosine is one standard deviation below the mean, in the batches
    so far: about a sixth of the rows are farther from their classes. There the target's logit is to
    keep at least this share of what softmax gives it:

    .. math:: \frac{\lambda \cos\theta + \psi}{1 + \lambda} \ge \mathrm{keep}\,\cos\theta
              \Leftrightarrow
              \frac{1}{1 + \lambda} \le (1 - \mathrm{keep})\,\frac{\cos\theta}{\cos\theta - \psi}

    with psi = 1 - 2 m theta / pi, which it is at every half bucket, and cos theta at least 0. The
    layer measures the angle after each training step, so lam follows a step later. A batch of few
    rows has little of a deviation, and one row has none: there a larger ``keep`` does its work.

    A schedule belongs to one layer: two that share it would each advance it, and the second warns.
    Activation checkpointing of the layer (``torch.utils.checkpoint``), which runs its forward
    twice, counts as one step (docs/ecosystem.md has the exceptions).

    Args:
        base: lam before the first step, >= 0.
        gamma: how fast lam falls per step, >= 0.
        power: exponent, >= 0.
        minimum: lam never falls below it, >= 0.
        keep: in [0, 1), or None for the curve alone, as the authors trained.
        num_classes: C of the layer, and ``keep`` goes by the mean and the deviation of the
            classes, each of which counts alike, not of the rows: for a long tail of rare classes.
            It takes two numbers a class, on every process where classes are spread.
        auto_step: let the layer advance the schedule by one on each training forward with gradients
            enabled and a target. With False, call :meth:`step` yourself, once a training step
            (gradient accumulation, say).

    Attributes:
        steps: 0-dim int64 buffer, training steps taken.
        lam: 0-dim float32 buffer, the current value.
        share: 0-dim float32 buffer, with ``keep`` the 1 / (1 + lam) that the angles so far allow,
            without it that of ``lam``.
        class_cosines: (2, C) float32 buffer, with ``num_classes``: running means, over the batches
            that a class is in, of its rows' cosines and their squares; -1 before the first.

    Raises:
        TypeError: a parameter is not a number.
        ValueError: a parameter is negative or not finite in float32, ``keep`` is not below 1, or
            there are ``num_classes`` and no ``keep``.
    """

    _has_layer = False

    def __init__(
        self,
        base: float,
        gamma: float,
        power: float,
        minimum: float = 0.0,
        *,
        keep: float | None = None,
        num_classes: int | None = None,
        auto_step: bool = True,
    ) -> None:
        super().__init__()
        parameters = {"base": base, "gamma": gamma, "power": power, "minimum": minimum}
        for name, value in parameters.items():
            check_number(name, value)
        if keep is not None:
            keep = check_number("keep", keep)
            if keep >= 1:
                raise ValueError(f"keep: expected in [0, 1), got {keep}")
        if num_classes is not None:
            num_classes = positive("num_classes", num_classes)
            if keep is None:
                raise ValueError("num_classes: expected a keep too, for that is what goes by them")
        self.base, self.gamma = float(base), float(gamma)
        self.power, self.minimum = float(power), float(minimum)
        self.keep = keep
        self.num_classes = num_classes
        self.auto_step = auto_step
        self.begin()

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
        num_classes: int | None = None,
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
            keep, num_classes, auto_step: as for :class:`LambdaSchedule`.

        Raises:
            TypeError: ``total_steps`` is no integer, or another argument no number.
            ValueError: ``total_steps`` < 1 or not of 64 bits, ``minimum`` outside (0, 1000),
                ``keep`` outside [0, 1).
        """
        steps = positive("total_steps", total_steps)
        check_number("minimum", minimum)
        if not 0 < minimum < _BASE:
            raise ValueError(f"minimum: expected in (0, {_BASE:g}), got {minimum}")
        annealed = _FRACTION * steps
        gamma = ((_BASE / minimum) ** (1 / _POWER) - 1) / annealed
        curve = _BASE, gamma, _POWER, minimum
        return cls(*curve, keep=keep, num_classes=num_classes, auto_step=auto_step)

    @classmethod
    def by_angle(
        cls,
        *,
        minimum: float = 0.5,
        keep: float = _KEEP,
        num_classes: int | None = None,
        auto_step: bool = True,
    ) -> LambdaSchedule:
        """The schedule that needs no number of steps: lam is what the measured angle allows.

        From 1000 its curve is at ``minimum`` within some fifty steps; from then on ``keep`` alone
        decides. Arguments and errors are those of :class:`LambdaSchedule`.
        """
        keep = check_number("keep", keep)  # without it there is no angle to go by
        curve = _BASE, 1.0, 2.0, minimum
        return cls(*curve, keep=keep, num_classes=num_classes, auto_step=auto_step)

    def belong_to_layer(self) -> None:
        """Called by a layer that is given this schedule. Warns where another has it already."""
        if self._has_layer and self.auto_step and not self.is_constant:
            warnings.warn(
                "lam: this schedule belongs to another layer already: each of them advances it, "
                "and the second begins where the first has got to. Give each one of its own",
                stacklevel=4,
            )
        self._has_layer = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no layer yet."""
        return self.__dict__ | {"_has_layer": False}

    def upcoming(self) -> Tensor:
        """lam of the next training step, a 0-dim float32 tensor; changes nothing."""
        least_share = 0.0 if self.keep is None else 1 / (1 + _BASE)
        curve = self.base, self.gamma, self.power, self.minimum
        return _upcoming_op(self.steps, self.share, *curve, least_share)

    def commit(self, lam: float | Tensor) -> None:
        """Take the step whose lam is ``lam`` (from :meth:`upcoming`), in place.

        Raises:
            TypeError, ValueError: it is no number >= 0 and no 0-dim float tensor on the device.
        """
        self._anneal(lam_tensor(lam, self.lam), None, 1)

    def observe(self, cosine: Tensor, margin: int) -> None:
        """Take in, for ``keep``, how close a batch's features are to their classes.

        Args:
            cosine: between a feature and the vector of its class, the batch's mean less one
                standard deviation: a 0-dim float tensor on the schedule's device. NaN and what is
                below 0 count as 0, no angle at all; inf, as of no rows, as nothing measured.
            margin: of the layer.

        Raises:
            TypeError, ValueError: ``cosine`` is no 0-dim float tensor on the device, or ``margin``
                is none.
        """
        if not isinstance(cosine, Tensor) or cosine.dim() != 0 or not cosine.is_floating_point():
            raise TypeError(f"cosine: expected a 0-dim float tensor, got {kind(cosine)}")
        check_device("cosine", cosine, self.lam)
        self._anneal(None, cosine.detach().float(), check_margin(margin))

    def begin_step(self) -> Tensor:
        """lam for a training forward: :meth:`upcoming` with ``auto_step``, else as it is.

        Raises:
            RuntimeError: under a transform of ``torch.func``, which may change no buffer.
        """
        if self.is_constant:
            return self.lam
        if is_transformed():
            raise RuntimeError(
                "torch.func: a layer that anneals changes its buffers in training; call eval() "
                "first, or use a constant lam"
            )
        return self.upcoming() if self.auto_step else self.lam

    def count_classes(self, cosines: Tensor, target: Tensor) -> Tensor:
        """The rows of a batch into the running means of their classes, with ``num_classes``; the
        cosine for :meth:`end_step`. Arguments are those of ``portable_classes.count_classes_``.
        """
        low = _count_classes_op(self.class_cosines, cosines.detach(), target, _CLASS_MEMORY)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(self.class_cosines)
        return low

    def end_step(self, lam: Tensor, cosine: Tensor, margin: int) -> None:
        """:meth:`commit` (with ``auto_step``) and :meth:`observe` of a training forward, in one."""
        if not self.is_constant:
            self._anneal(lam if self.auto_step else None, cosine, margin)

    def _anneal(self, lam: Tensor | None, cosine: Tensor | None, margin: int) -> None:
        if self.keep is None:
            cosine = None
        state = self.steps, self.lam, self.share
        _anneal_op(*state, lam, cosine, margin, -1.0 if self.keep is None else self.keep, _MEMORY)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(state)

    def step(self) -> None:
        """Advance by one training step, in place, without synchronising the device."""
        self.commit(self.upcoming())

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        if self.is_constant:
            return f"{self.value(0):g}"
        return (
            f"base={self.base:g}, gamma={self.gamma:g}, power={self.power:g}, "
            f"minimum={self.minimum:g}"
            + ("" if self.keep is None else f", keep={self.keep:g}")
            + ("" if self.num_classes is None else f", num_classes={self.num_classes}")
        )
