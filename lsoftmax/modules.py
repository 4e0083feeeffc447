"""The layers: what a model holds. Parameters and annealing state here, everything else below."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks, diagnostics, functional
from .rows import NO_INDEX
from .schedule import LambdaSchedule

__all__ = ["LSoftmaxLinear", "LSoftmaxLoss"]


def default_schedule() -> LambdaSchedule:
    """What ``lam=None`` means: a layer does not know how long it will be trained, so lam follows
    the measured angle. ``LambdaSchedule.for_steps`` adds a curve for a known number of steps.
    """
    return LambdaSchedule.by_angle()


_own_cosines_op = torch.ops.lsoftmax.own_cosines.default


class _Annealed(nn.Module):
    """What both layers share: the margin and its schedule."""

    margin: int
    schedule: LambdaSchedule

    def _init_margin(
        self,
        margin: int,
        lam: LambdaSchedule | float | None,
        device: torch.device,
        num_classes: int,
    ) -> None:
        self.margin = checks.check_margin(margin)
        if lam is None:
            lam = default_schedule()
        elif not isinstance(lam, LambdaSchedule):
            lam = LambdaSchedule.constant(checks.check_number("lam", lam))
        if lam.num_classes not in (None, num_classes):
            raise ValueError(f"lam.num_classes: expected {num_classes}, got {lam.num_classes}")
        lam.belong_to_layer()
        # One made under a meta device has no numbers to move: there it begins.
        self.schedule = (lam.to_empty if lam.lam.is_meta else lam.to)(device=device)

    @property
    def lam(self) -> Tensor:
        """The current annealing weight, a 0-dim float32 tensor on the layer's device.

        It is the schedule's own, which training changes in place. For a log ``head.lam.item()``.
        """
        return self.schedule.lam

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accepts class vectors without annealing, and begins it, however far this layer was: the
        full margin on class vectors that had none would lose them.
        """
        own = prefix + "schedule."
        saved = self.schedule.state_dict(prefix=own).keys()
        loaded = any(prefix + name in state_dict for name, _ in self.named_parameters())
        if loaded and not saved & state_dict.keys():
            beginning = self.schedule.beginning(self.lam.device)
            state_dict.update({key: beginning[key.removeprefix(own)] for key in saved})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _begin_forward(self) -> tuple[Tensor, bool]:
        """lam for the forward that begins, and whether it is a training step.

        If so, ``_end_forward`` is due once the loss is there: a forward that raised is none.
        """
        schedule, trains = self.schedule, self._is_training()
        schedule.check_begun()
        return schedule.begin_step() if trains else schedule.lam, trains

    def _end_forward(
        self,
        lam: Tensor,
        cosine: Tensor,
        input: Tensor,
        class_vectors: Tensor,
        target: Tensor,
        ignore_index: int = NO_INDEX,
    ) -> None:
        """``schedule.end_step`` of a training forward, by the rows' ``cosine`` or the classes'."""
        if self.schedule.num_classes is not None:
            w, counted = class_vectors.detach(), self.schedule.num_classes
            if counted != w.shape[0]:  # a schedule that was exchanged later
                raise ValueError(f"schedule.num_classes: expected {w.shape[0]}, got {counted}")
            x, y = functional.as_batch(input.detach().to(w.dtype), target)
            cosine = self.schedule.count_classes(_own_cosines_op(x, w, y, ignore_index), y)
        self.schedule.end_step(lam, cosine, self.margin)

    def _is_training(self) -> bool:  # a step that runs again has been counted
        return self.training and torch.is_grad_enabled() and not checks.is_recomputed()


class LSoftmaxLoss(_Annealed):
    r"""The classifier and its Large-Margin Softmax loss in one module, without bias.

    Twin of :class:`torch.nn.LinearCrossEntropyLoss`: the same argument names and the same
    ``linear.weight``. Training calls the module; inference is ``loss.linear(x)``, plain logits. The
    loss is that of :func:`lsoftmax.functional.lsoftmax_loss` (Liu et al., ICML 2016).

    ``state_dict()`` holds ``linear.weight``, ``weight`` where given, and with a schedule its
    buffers. A checkpoint of ``LinearCrossEntropyLoss(bias=False)`` loads as it is; the other way
    round ``strict=False`` passes over the schedule (with a constant ``lam`` there is none).

    Args:
        in_features: D, the size of a feature.
        num_classes: C, one row of ``linear.weight`` each.
        margin: integer m >= 1; 1 is plain softmax.
        lam: annealing: a :class:`LambdaSchedule` (which then belongs to this layer), a constant
            >= 0, or None for :meth:`LambdaSchedule.by_angle`. Where the number of training steps
            is known, pass ``LambdaSchedule.for_steps(total_steps)``.
        device: of the module.
        dtype: of ``linear.weight``.
        reduction, weight, ignore_index, label_smoothing: as :class:`torch.nn.CrossEntropyLoss`.
        memory_budget: bytes that what is N x C may take, as in
            :func:`lsoftmax.functional.lsoftmax_loss`.
        bias: False, for who says so to torch's layer.

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
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        memory_budget: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        checks.check_no_bias(bias)
        in_features = checks.positive("in_features", in_features)
        num_classes = checks.positive("num_classes", num_classes)
        checks.check_dtype(dtype)
        checks.check_loss_options(reduction, label_smoothing)
        budget = checks.check_memory_budget(memory_budget)
        if weight is not None:
            checks.check_class_weight(weight, num_classes)
        self.linear = nn.Linear(in_features, num_classes, bias=False, device=device, dtype=dtype)
        self._init_margin(margin, lam, self.linear.weight.device, num_classes)
        if weight is not None:
            weight = weight.to(self.linear.weight.device)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.label_smoothing = float(label_smoothing)
        self.memory_budget = budget

    @property
    def in_features(self) -> int:
        """D, as of ``linear``."""
        return self.linear.in_features

    @property
    def num_classes(self) -> int:
        """C, as of ``linear``."""
        return self.linear.out_features

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss; a training forward with gradients enabled advances the schedule by one step."""
        lam, trains = self._begin_forward()
        loss, cosine = functional.loss_and_cosine(
            input,
            self.linear.weight,
            target,
            self.margin,
            lam,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            memory_budget=self.memory_budget,
        )
        if trains:
            rows = input, self.linear.weight, target, self.ignore_index
            self._end_forward(lam, cosine, *rows)
        return loss

    def margin_stats(self, input: Tensor, target: Tensor) -> diagnostics.MarginStats:
        """:func:`lsoftmax.margin_stats` with this layer's class vectors, margin and lam, for a log.

        Rows of ``ignore_index`` do not count; to leave them out waits for the device.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape, or no row counts.
            IndexError: a target outside [0, C), on a CPU.
        """
        own = self.margin, self.lam, self.ignore_index
        return diagnostics.stats_of(input, self.linear.weight, target, *own)

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return (
            f"margin={self.margin}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )


class LSoftmaxLinear(nn.Linear, _Annealed):
    """``nn.Linear(bias=False)`` that returns margin logits where a target is given.

    For a loss of one's own on top; :class:`LSoftmaxLoss` is faster, and takes an ``ignore_index``:
    here every row has a class, so drop padded ones first. Drop-in for the published LSoftmaxLinear
    layers, and for ``nn.Linear``, whose checkpoints load as they are.

    Args:
        in_features: D, the size of a feature.
        out_features: C, one row of ``weight`` per class.
        margin: integer m >= 1.
        lam: as in :class:`LSoftmaxLoss`.
        device, dtype: of the weight.
        bias: False, for who says so to ``nn.Linear``.

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
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        bias: bool = False,
    ) -> None:
        checks.check_no_bias(bias)
        in_features = checks.positive("in_features", in_features)
        out_features = checks.positive("out_features", out_features)
        checks.check_dtype(dtype)
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self._init_margin(margin, lam, self.weight.device, out_features)

    def reset_parameters(self) -> None:
        """New class vectors, and annealing from its beginning."""
        super().reset_parameters()
        if "schedule" in self._modules:  # not yet, as nn.Linear is made
            self.schedule.reset_parameters()

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        """Margin logits with a target (a training forward advances the schedule), else plain."""
        if target is None:
            return super().forward(input)
        lam, trains = self._begin_forward()
        logits, cosine = functional.logits_and_cosine(input, self.weight, target, self.margin, lam)
        if trains:
            self._end_forward(lam, cosine, input, self.weight, target)
        return logits

    def margin_stats(self, input: Tensor, target: Tensor) -> diagnostics.MarginStats:
        """:func:`lsoftmax.margin_stats` with this layer's weight, margin and lam, for a log."""
        return diagnostics.margin_stats(input, self.weight, target, self.margin, self.lam)

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return f"{super().extra_repr()}, margin={self.margin}"
