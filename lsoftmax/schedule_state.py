"""A schedule's curve, and its numbers on their way through devices, types and checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_number, is_transformed


def no_cosines(num_classes: int, device: torch.device | None) -> Tensor:
    """(2, C): of each class the mean cosine and mean square, of which -1 says that none came."""
    start = torch.tensor([[0.0], [-1.0]], dtype=torch.float32, device=device)
    return start.repeat(1, num_classes)


class ScheduleState(nn.Module):
    """Parameters of the curve, which the subclass sets, and buffers that keep their bits whatever
    becomes of the layer; see ``LambdaSchedule``.
    """

    steps: Tensor
    lam: Tensor
    share: Tensor
    class_cosines: Tensor  # with num_classes
    base: float
    gamma: float
    power: float
    minimum: float
    keep: float | None
    num_classes: int | None = None  # also of one that was pickled before there was any
    _has_no_numbers = False  # since it was made on the meta device

    @property
    def is_constant(self) -> bool:
        """Whether lam never changes."""
        return self.keep is None and (self.gamma == 0 or self.power == 0)

    def value(self, step: int | Tensor) -> float:
        """The curve after ``step`` training steps, as a Python float: for plots and logs. lam is
        this, or with ``keep`` at least this.

        Raises:
            TypeError, ValueError: ``step`` is no number >= 0.
        """
        taken = check_number("step", step.item() if isinstance(step, Tensor) else step)
        return max(self.minimum, self.base * (1 + self.gamma * taken) ** -self.power)

    def beginning(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """The buffers before the first step."""
        lam = self.value(0)
        share = 1 / (1 + lam) if self.keep is None else 0.0
        buffers = {
            "steps": torch.zeros((), dtype=torch.int64, device=device),
            "lam": torch.full((), lam, dtype=torch.float32, device=device),
            "share": torch.full((), share, dtype=torch.float32, device=device),
        }
        if self.num_classes is not None:
            buffers["class_cosines"] = no_cosines(self.num_classes, device)
        return buffers

    def begin(self) -> None:
        """Make the buffers. A constant is configuration, not state: it is not saved, so that the
        state_dict of a layer with a constant lam is that of the plain layer.
        """
        for name, number in self.beginning().items():
            self.register_buffer(name, number, persistent=not self.is_constant)
        self._has_no_numbers = self.lam.is_meta

    def check_begun(self) -> None:
        """Of a schedule made on the meta device whose buffers have been replaced since, looks once
        whether by numbers or by uninitialised memory, which transformers' ``from_pretrained`` puts
        where a checkpoint has nothing. A constant needs none to begin. Under ``torch.compile`` the
        look breaks the graph.

        Raises:
            RuntimeError: the numbers are those of no schedule.
        """
        if not self._has_no_numbers or self.lam.is_meta or is_transformed():
            return
        if self.is_constant:
            self.reset_parameters()
            return
        steps, lam, share = int(self.steps), float(self.lam), float(self.share)
        # Of any schedule, for the one that was saved may have been another.
        in_range = 0 <= steps < 2**40 and 0 <= lam <= max(1e9, self.base) and 0 <= share <= 1
        if not in_range or (lam < 1e-6 and share < 0.5):
            raise RuntimeError(
                f"LambdaSchedule: steps = {steps}, lam = {lam:g}, share = {share:g} are of no "
                "schedule. It was made on the meta device and not initialised since: call its "
                "reset_parameters(), in transformers from _init_weights (docs/ecosystem.md)"
            )
        self._has_no_numbers = False
        if self.num_classes is not None:  # which the one that was saved may not have had
            mean, square = self.class_cosines
            none = (mean == 0) & (square == -1)
            some = (mean.abs() < 1.01) & (square > 0) & (square < 1.01)
            if not bool((none | some).all()):
                self.class_cosines.copy_(no_cosines(self.num_classes, self.lam.device))

    def _apply(self, fn: Any, recurse: bool = True) -> ScheduleState:
        """Module.to(), half() and so on: the device changes, numbers keep their bits, in to_empty()
        too.
        """
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        if before["lam"].is_meta and not self.lam.is_meta:  # there are none to move
            before = self.beginning(self.lam.device)
            self._has_no_numbers = False
        for name, number in before.items():
            now = getattr(self, name)
            if now.dtype != number.dtype:
                setattr(self, name, number.to(now.device))
            elif now is not number:
                now.copy_(number)
        self._has_no_numbers |= self.lam.is_meta
        return self

    def reset_parameters(self) -> None:
        """Back to before the first step, in place; one made on the meta device begins here."""
        for name, number in self.beginning(self.lam.device).items():
            getattr(self, name).copy_(number)
        self._has_no_numbers = self.lam.is_meta

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Accepts a checkpoint without annealing, which changes none. And one of before there was a
        ``share``: training goes on at its lam. And one that did not count classes, which begins it.
        """
        state = {prefix + name: value for name, value in self.state_dict().items()}
        given = prefix + "lam" in state_dict
        if not state.keys() & state_dict.keys():
            state_dict.update(state)
        elif given:
            state_dict.setdefault(prefix + "share", 1 / (1 + state_dict[prefix + "lam"]))
            if self.num_classes is not None:
                begun = no_cosines(self.num_classes, state_dict[prefix + "lam"].device)
                state_dict.setdefault(prefix + "class_cosines", begun)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers"):  # into a layer made on the meta device
            for name, number in self.named_buffers(recurse=False):
                if number.is_floating_point():  # in a 16-bit checkpoint perhaps not float32
                    setattr(self, name, number.float())
            where = torch.device("cpu") if self.lam.is_meta else self.lam.device
            for name, number in self.beginning(where).items():
                if getattr(self, name).is_meta:  # not in the checkpoint
                    setattr(self, name, number)
        self._has_no_numbers &= not given or self.lam.is_meta
