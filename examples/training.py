"""The one training loop of the examples: SGD, checkpointed every epoch, the same bits when resumed.

Nothing here depends on the loss: for one seed all margins get the same initial weights (from the
caller), the same batches in the same order, and the same learning rates.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import lsoftmax
from balance import BATCHES, balanced_order, has_begun, inverse_counts
from files import save

# In words: importing lsoftmax.distributed takes a second, which few trainings need.
Loss: TypeAlias = "lsoftmax.LSoftmaxLoss | lsoftmax.distributed.ClassParallelLSoftmaxLoss"
Augment = Callable[[Tensor, torch.Generator], Tensor]
Log = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, whatever its loss.

    The learning rate follows one cycle (up for a tenth of the training, then a cosine down to 0),
    or, with ``drops``, is constant but for a division by ten after each of those steps.
    """

    epochs: int
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    drops: tuple[int, ...] = ()
    clip: float | None = None  # the norm that a step's gradient is cut down to
    balance: str | None = None  # of classes of unequal size, see balance.py

    def steps(self, count: int) -> int:
        """Training steps of the whole training on ``count`` images; a last short batch is left out.

        Raises:
            ValueError: there are fewer images than one batch.
        """
        if count < self.batch:
            raise ValueError(f"expected at least one batch of {self.batch} images, got {count}")
        return self.epochs * (count // self.batch)


class Training:
    """A network in training, which ``state_dict()`` holds to the last bit.

    Args:
        network: images to features; on the device of ``images``.
        criterion: the loss, whose ``linear`` is the classifier.
        images: (N, ...), as the network takes them.
        labels: (N,) int64.
        recipe: the optimizer and its learning rates.
        seed: of the order of the images and of ``augment``.
        augment: from a batch of images and a generator (on the CPU, so that every device draws the
            same) to the images to train on.
        amp: autocast to bfloat16.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Loss,
        images: Tensor,
        labels: Tensor,
        recipe: Recipe,
        seed: int,
        *,
        augment: Augment | None = None,
        amp: bool = False,
    ) -> None:
        self.network, self.criterion = network, criterion
        self.images, self.labels = images, labels
        self.recipe, self.augment, self.amp = recipe, augment, amp
        steps = recipe.steps(len(labels))
        # Groups of their own: an optimizer may treat the parameters of a group as one list.
        groups = [{"params": list(part.parameters())} for part in (network, criterion)]
        self.optimizer = torch.optim.SGD(
            groups, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
        )
        lr_scheduler = torch.optim.lr_scheduler
        self.scheduler: torch.optim.lr_scheduler.LRScheduler
        if recipe.drops:
            self.scheduler = lr_scheduler.MultiStepLR(self.optimizer, list(recipe.drops))
        else:
            self.scheduler = lr_scheduler.OneCycleLR(
                self.optimizer, recipe.lr, steps, pct_start=0.1
            )
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[Log] = []  # an entry an epoch
        self.seconds = 0.0

    def run_epoch(self) -> Log:
        """Train on as many images as there are; the epoch's entry of ``history``."""
        start = time.perf_counter()
        device, batch_size = self.labels.device, self.recipe.batch
        self.network.train()
        self.criterion.train()
        if has_begun(self.recipe.balance, len(self.history), self.recipe.epochs):
            weight = self.criterion.weight
            weight.copy_(inverse_counts(self.labels, len(weight)))
        count = len(self.labels) // batch_size * batch_size
        order = self.order()[:count].to(device)
        total = torch.zeros((), device=device)
        for index in order.split(batch_size):
            images, labels = self.images[index], self.labels[index]
            if self.augment is not None:
                images = self.augment(images, self.generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
                features = self.network(images)
                loss = self.criterion(features, labels)
            self.optimizer.zero_grad()
            loss.backward()
            if self.recipe.clip is not None:
                # Torch's own takes no class vectors of the distributed layer beside others.
                lsoftmax.distributed.clip_grad_norm_(self.parameters(), self.recipe.clip)
            self.optimizer.step()
            self.scheduler.step()
            total += loss.detach()
        stats = self.criterion.margin_stats(features, labels)
        log = {
            "epoch": len(self.history) + 1,
            "loss": (total / (count // batch_size)).item(),  # the one wait for the device
            "lr": self.scheduler.get_last_lr()[0],
            **stats.floats(),
            "warning": lsoftmax.collapse_warning(stats),
        }
        self.history.append(log)
        self.seconds += time.perf_counter() - start
        return log

    def order(self) -> Tensor:
        """The images (N,) of an epoch: each once, or drawn with balanced classes."""
        if self.recipe.balance == BATCHES:
            return balanced_order(self.labels.cpu(), self.generator)
        return torch.randperm(len(self.labels), generator=self.generator)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the network and of its loss."""
        return chain(self.network.parameters(), self.criterion.parameters())

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on: tensors and plain values."""
        on_cuda = self.labels.device.type == "cuda"
        return {
            "network": self.network.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.labels.device) if on_cuda else None,
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken."""
        for name in ("network", "criterion", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.labels.device)
        self.history, self.seconds = state["history"], state["seconds"]

    def run(
        self,
        after_epoch: Callable[[Log], object] = lambda log: None,
        checkpoint: Path | None = None,
    ) -> Training:
        """Train to the end, from the checkpoint where there is one; it is rewritten every epoch.

        ``after_epoch`` is called with every entry of ``history``, those before the checkpoint too.
        The network and its criterion are left in evaluation mode.
        """
        if checkpoint is not None and checkpoint.exists():
            try:
                # On the CPU: where states belong load_state_dict knows, and generators' live there.
                state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise SystemExit(
                    f"{checkpoint} is no checkpoint ({type(error).__name__}): remove it."
                ) from None
            self.load_state_dict(state)
        for log in self.history:
            after_epoch(log)
        while len(self.history) < self.recipe.epochs:
            log = self.run_epoch()
            if checkpoint is not None:
                save(checkpoint, self.state_dict())
            after_epoch(log)
        self.network.eval()
        self.criterion.eval()
        return self


@torch.no_grad()
def features_of(network: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """Features (N, D) float32 of images, in evaluation mode."""
    training = network.training
    network.eval()
    features = torch.cat([network(part).float() for part in images.split(batch)])
    network.train(training)
    return features
