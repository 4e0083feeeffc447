"""The layers: what a model holds. Parameters and annealing state here, everything else below."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional
from .schedule import LambdaSchedule

__all__ = ["LSoftmaxLinear", "LSoftmaxLoss"]


def default_schedule() -> LambdaSchedule:
    """What ``lam=None`` means: SphereFace's schedule, which trained without collapse in every first
    test: base 1000, gamma 0.12, power 1, never below 5.
    """
    return LambdaSchedule(base=1000.0, gamma=0.12, power=1.0, minimum=5.0)


class _Annealed(nn.Module):
    """What both layers share: the margin and its schedule."""

    margin: int
    schedule: LambdaSchedule

    def _init_margin(
        self, margin: int, lam: LambdaSchedule | float | None, device: torch.device
    ) -> None:
        self.margin = functional.check_margin(margin)
        if lam is None:
            lam = default_schedule()
        elif not isinstance(lam, LambdaSchedule):
            lam = LambdaSchedule.constant(functional.check_lam(lam))
        self.schedule = lam.to(device=device)

    @property
    def lam(self) -> Tensor:
        """The current annealing weight, a 0-dim float32 tensor on the layer's device."""
        return self.schedule.lam

    def _is_training_step(self) -> bool:
        schedule = self.schedule
        advances = schedule.auto_step and not schedule.is_constant
        return advances and self.training and torch.is_grad_enabled()


class LSoftmaxLoss(_Annealed):
    r"""The classifier and its Large-Margin Softmax loss in one module, without bias.

    Twin of :class:`torch.nn.LinearCrossEntropyLoss`: the same argument names and the same
    ``linear.weight``. Training calls the module; inference is ``loss.linear(x)``, plain logits. The
    loss is that of :func:`lsoftmax.functional.lsoftmax_loss` (Liu et al., ICML 2016).

    ``state_dict()`` holds ``linear.weight``, ``weight`` where given, and with a schedule its two
    buffers. A checkpoint of ``LinearCrossEntropyLoss(bias=False)`` loads as it is; the other way
    round ``strict=False`` passes over the schedule (with a constant ``lam`` there is none).

    Args:
        in_features: D, the size of a feature.
        num_classes: C.
        margin: integer m >= 1; 1 is plain softmax.
        lam: annealing: a :class:`LambdaSchedule` (which then belongs to this layer), a constant
            >= 0, or None for the default schedule (base 1000, gamma 0.12, power 1, minimum 5).
        device: of the module.
        dtype: of ``linear.weight``.
        reduction, weight, ignore_index, label_smoothing: as :class:`torch.nn.CrossEntropyLoss`.

    Shape:
        - input: (N, D) or (D,)
        - target: (N,) or (), int64 in [0, C) or ``ignore_index``
        - output: scalar, or the shape of target for ``reduction="none"``

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> head = LSoftmaxLoss(512, 1000, margin=4)
        >>> loss = head(torch.randn(32, 512), torch.randint(1000, (32,)))
        >>> loss.backward()
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: int = 4,
        *,
        lam: LambdaSchedule | float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        functional.check_loss_options(reduction, ignore_index, label_smoothing)
        if weight is not None:
            functional.check_class_weight(weight, num_classes)
        self.linear = nn.Linear(in_features, num_classes, bias=False, device=device, dtype=dtype)
        self._init_margin(margin, lam, self.linear.weight.device)
        if weight is not None:
            weight = weight.to(self.linear.weight.device)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss; a training forward with gradients enabled advances the schedule by one step."""
        is_step = self._is_training_step()
        lam = self.schedule.upcoming() if is_step else self.lam
        loss = functional.lsoftmax_loss(
            input,
            self.linear.weight,
            target,
            self.margin,
            lam,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        if is_step:  # only now: a forward that raised is no training step
            self.schedule.commit(lam)
        return loss

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return (
            f"margin={self.margin}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )


class LSoftmaxLinear(nn.Linear, _Annealed):
    """``nn.Linear(bias=False)`` that returns margin logits where a target is given.

    For a loss of one's own on top; :class:`LSoftmaxLoss` is faster. Drop-in for the published
    LSoftmaxLinear layers, and for ``nn.Linear``, whose checkpoints load as they are.

    Args:
        in_features: D.
        out_features: C, one row of ``weight`` per class.
        margin: integer m >= 1.
        lam: as in :class:`LSoftmaxLoss`.
        device, dtype: of the weight.

    Shape:
        - input: (N, D) or (D,); with ``target=None`` any shape (..., D)
        - target: (N,) or (), int64 in [0, C)
        - output: (N, C) or (C,); with ``target=None`` (..., C)

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        margin: int = 4,
        *,
        lam: LambdaSchedule | float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self._init_margin(margin, lam, self.weight.device)

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        """Margin logits with a target (a training forward advances the schedule), else plain."""
        if target is None:
            return super().forward(input)
        is_step = self._is_training_step()
        lam = self.schedule.upcoming() if is_step else self.lam
        logits = functional.lsoftmax_linear(input, self.weight, target, self.margin, lam)
        if is_step:
            self.schedule.commit(lam)
        return logits

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return f"{super().extra_repr()}, margin={self.margin}"
