"""A random share of the classes per step, as PartialFC draws it (An et al., ICCVW 2021)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checks


class ClassSampling(nn.Module):
    """Keeps the classes that are targets, and random others up to a share of the shard.

    How many classes a sample has follows from shapes alone, so that nothing waits for the device:
    ``rate`` of the shard, but at least N or the whole shard, for any of them may be targets.

    Args:
        rate: in (0, 1).
        seed: with the number of draws so far and the shard's rank it decides the sample (another
            one on a GPU than on a CPU).
        device: of the classes.

    Attributes:
        draws: 0-dim int64 buffer, how often was drawn: the whole state of the generator.
    """

    draws: Tensor

    def __init__(self, rate: float, seed: int, device: torch.device) -> None:
        super().__init__()
        self.rate, self.seed = rate, seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=device))
        self._drawn = 0  # the same on the host

    @torch.no_grad()
    def forward(self, target: Tensor, num_classes: int, rank: int, again: bool = False) -> Tensor:
        """The sample of the step that begins: sorted rows of the shard.

        Args:
            target: (N,), a row of the shard, or -1.
            num_classes: rows of the shard.
            rank: the shard's.
            again: the step counted last, whose forward an activation checkpoint runs once more.
        """
        draw = self._drawn - 1 if again else self._drawn
        sequence = np.random.SeedSequence((self.seed, rank, draw))
        generator = torch.Generator(target.device)  # the module may have been moved
        generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        size = self.size(num_classes, target.shape[0])
        keys = torch.rand(num_classes + 1, generator=generator, device=target.device)
        keys.index_fill_(0, torch.where(target < 0, num_classes, target), 2.0)
        return keys[:num_classes].topk(size).indices.sort().values

    def size(self, num_classes: int, n: int) -> int:
        """How many of a shard's classes a sample has, for a batch of ``n``."""
        return min(num_classes, max(math.ceil(self.rate * num_classes), n))

    def advance(self) -> None:
        """Count the draw: the next one is another."""
        self.draws.add_(1)
        self._drawn += 1

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return f"rate={self.rate:g}, seed={self.seed}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accepts a checkpoint of a layer that did not sample: it has drawn nothing."""
        state_dict.setdefault(prefix + "draws", torch.zeros_like(self.draws))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._drawn = int(self.draws)


def check_sampling(sample_rate: float, seed: int, label_smoothing: float) -> None:
    """Raises TypeError or ValueError."""
    if not checks.is_number(sample_rate):
        raise TypeError(
            f"sample_rate: expected a number in (0, 1], got {type(sample_rate).__name__}"
        )
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate: expected a number in (0, 1], got {sample_rate}")
    if not checks.is_integer(seed):
        raise TypeError(f"seed: expected an integer >= 0, got {checks.kind(seed)}")
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    if sample_rate < 1 and label_smoothing > 0:
        raise ValueError(
            "label_smoothing: expected 0 with sample_rate < 1, for it needs all logits, got "
            f"{label_smoothing}"
        )
