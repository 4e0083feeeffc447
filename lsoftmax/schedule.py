"""Annealing: how much of the plain logit is left in the target's logit as training goes on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LambdaSchedule"]


class LambdaSchedule(nn.Module):
    r"""Caffe's rule for the annealing weight, as the authors trained.

    .. math:: \lambda(t) = \max(\mathrm{minimum},\ \mathrm{base}\,(1 + \gamma t)^{-\mathrm{power}})

    t counts training steps from 1; before the first step lam is ``base``. The count and lam are
    buffers: ``state_dict()`` carries them, a resumed run continues the same curve, and lam is
    updated in place on its device, without synchronising it (source: the authors'
    ``largemargin_inner_product`` layer).

    A schedule belongs to one layer: two that share it would each advance it. Under activation
    checkpointing of the layer itself, which runs its forward twice, use ``auto_step=False``.

    Args:
        base: lam before the first step, >= 0.
        gamma: how fast lam falls per step, >= 0.
        power: exponent, >= 0.
        minimum: lam never falls below it, >= 0.
        auto_step: let the layer advance the schedule by one on each training forward with gradients
            enabled and a target. With False, call :meth:`step` yourself, once a training step
            (gradient accumulation, say).

    Attributes:
        steps: 0-dim int64 buffer, training steps taken.
        lam: 0-dim float32 buffer, the current value.

    Raises:
        TypeError: a parameter is not a number.
        ValueError: a parameter is negative or not finite.
    """

    steps: Tensor
    lam: Tensor

    def __init__(
        self,
        base: float,
        gamma: float,
        power: float,
        minimum: float = 0.0,
        *,
        auto_step: bool = True,
    ) -> None:
        super().__init__()
        parameters = {"base": base, "gamma": gamma, "power": power, "minimum": minimum}
        for name, value in parameters.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number >= 0, got {type(value).__name__}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        self.base, self.gamma = float(base), float(gamma)
        self.power, self.minimum = float(power), float(minimum)
        self.auto_step = auto_step
        # A constant is configuration, not state: it is not saved, so that the state_dict of a layer
        # with a constant lam is that of the plain layer.
        for name, start in (
            ("steps", torch.zeros((), dtype=torch.int64)),
            ("lam", torch.tensor(self.value(0), dtype=torch.float32)),
        ):
            self.register_buffer(name, start, persistent=not self.is_constant)

    @classmethod
    def constant(cls, lam: float) -> LambdaSchedule:
        """The schedule that stays at ``lam``."""
        return cls(base=lam, gamma=0.0, power=0.0)

    @property
    def is_constant(self) -> bool:
        """Whether lam never changes."""
        return self.gamma == 0 or self.power == 0

    def value(self, step: int) -> float:
        """lam after ``step`` training steps, as a Python float: for plots and logs."""
        return max(self.minimum, self.base * (1 + self.gamma * step) ** -self.power)

    @torch.no_grad()
    def upcoming(self) -> Tensor:
        """lam of the next training step, a 0-dim float32 tensor; changes nothing."""
        # float64: (1 + 1e-5 t)^-45 would lose the annealing's last digits in float32
        decay = (self.steps + 1).double().mul_(self.gamma).add_(1).pow_(-self.power)
        return decay.mul_(self.base).clamp_(min=self.minimum).float()

    @torch.no_grad()
    def commit(self, lam: Tensor) -> None:
        """Take the step whose lam is ``lam`` (from :meth:`upcoming`), in place."""
        self.steps.add_(1)
        self.lam.copy_(lam)

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
        )

    def _apply(self, fn: Any, recurse: bool = True) -> LambdaSchedule:
        """Module.to(), half() and so on: the device changes, lam stays float32 to the last bit."""
        lam = self.lam
        super()._apply(fn, recurse)
        if lam.is_meta and not self.lam.is_meta:  # to_empty(): there were no numbers to move
            self.reset_parameters()
        elif self.lam.dtype != torch.float32:
            self.lam = lam.to(self.steps.device)
        return self

    def reset_parameters(self) -> None:
        """Back to before the first step; a schedule made on the meta device begins here."""
        self.steps = torch.zeros_like(self.steps)
        self.lam = torch.full_like(self.steps, self.value(0), dtype=torch.float32)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accepts a checkpoint of a layer without annealing: training then starts on this curve."""
        saved = any(prefix + name in state_dict for name in ("steps", "lam"))
        if not saved and not self.is_constant:
            state_dict.update({prefix + "steps": self.steps, prefix + "lam": self.lam})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
