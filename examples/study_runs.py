"""Trainings of the trainability study, side by side."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import lsoftmax
from balance import BATCHES, balanced_order, has_begun, inverse_counts
from data import Labelled
from extras import needed
from lsoftmax import LambdaSchedule
from study_tasks import ANNEALINGS, TASKS, Cell, Task, build

with needed():
    from tqdm import tqdm

TRACED = 50  # points of a recorded training


def train(cells: Sequence[Cell], split: Labelled) -> list[dict[str, Any]]:
    """Trainings that differ in seed, margin and annealing only, side by side; their figures.

    Networks this small are mostly overhead, so their parameters are stacked along a first dimension
    of runs, R. The loss is that of ``lsoftmax.reference``, the specification.
    """
    task, count = TASKS[cells[0].task], len(split.train_labels)
    start, batches = time.perf_counter(), count // task.batch
    steps = task.epochs * batches
    runs = Runs(cells, split, steps)
    orders = [torch.Generator().manual_seed(cell.seed) for cell in cells]
    traced = [cell == Cell(cell.task, 4, cell.annealing, 0.1, 0) for cell in cells]
    traces: list[list[list[float]]] = [[] for _ in cells]
    diverged: list[int | None] = [None] * len(cells)
    for step in tqdm(range(steps), desc=f"{runs.name}, {len(cells)} runs", leave=False):
        if step % batches == 0:
            runs.weighted = has_begun(task.balance, step // batches, task.epochs)
            order = torch.stack([drawn(split.train_labels, task, order) for order in orders])
        batch = order[:, step % batches * task.batch :][:, : task.batch]
        labels = split.train_labels[batch]
        features = runs.features(split.train_images[batch])
        losses = runs.losses(features, labels)
        cosines, input_norms, weight_norms = runs.geometry(features, labels)
        if any(traced) and step % (steps // TRACED) == 0:
            points = torch.stack(
                [losses, runs.lam, degrees(cosines), input_norms.mean(1), weight_norms.amin(1)], 1
            ).tolist()
            for trace, point in zip(traces, points, strict=True):
                trace.append([step, *map(rounded, point)])
        for run, finite in enumerate(losses.isfinite().tolist()):
            if not finite and diverged[run] is None:
                diverged[run] = step
        runs.step(losses, cosines, labels)

    figures = measured(runs, split)
    seconds = rounded((time.perf_counter() - start) / len(cells))
    for run, figure in enumerate(figures):
        figure["diverged"] = diverged[run]
        figure["seconds"] = seconds
        if traced[run]:
            figure["trace"] = traces[run]
    return figures


def drawn(labels: Tensor, task: Task, generator: torch.Generator) -> Tensor:
    """The images of an epoch, in order."""
    if task.balance == BATCHES:
        return balanced_order(labels, generator)
    return torch.randperm(len(labels), generator=generator)


class Runs:
    """R networks with their classifiers, annealings and optimizer."""

    def __init__(self, cells: Sequence[Cell], split: Labelled, steps: int) -> None:
        first, self.margins = cells[0], [cell.margin for cell in cells]
        task, classes = TASKS[first.task], split.classes
        self.clip = task.clip
        self.class_weight = inverse_counts(split.train_labels, classes)
        self.weighted = False  # whether the loss has these weights now
        self.name, self.dtype = " ".join(first.group), getattr(torch, first.dtype)
        networks, classifiers = zip(*(build(cell, classes) for cell in cells), strict=True)
        self.network = networks[0]  # what it computes; parameters come from the stacks
        self.parameters, self.buffers = torch.func.stack_module_state(list(networks))
        self.weight = torch.stack([c.weight.detach() for c in classifiers]).requires_grad_()
        self.schedules = [as_schedule(ANNEALINGS[cell.annealing](steps, classes)) for cell in cells]
        parameters = [*self.parameters.values(), self.weight]
        if first.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, first.lr, momentum=0.9, weight_decay=5e-4
            )
        else:
            self.optimizer = torch.optim.AdamW(parameters, first.lr)
        # As the authors: divided by ten, twice.
        drops = [int(0.6 * steps), int(0.85 * steps)]
        self.rates = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, drops)
        self.lam = self.upcoming()

    def upcoming(self) -> Tensor:
        """lam of the next step, (R,)."""
        return torch.stack([schedule.upcoming() for schedule in self.schedules])

    def features(self, images: Tensor, shared: bool = False) -> Tensor:
        """Images (R, N, ...), or (N, ...) if shared, to features (R, N, D)."""

        def one(parameters: Any, buffers: Any, images: Tensor) -> Tensor:
            return torch.func.functional_call(self.network, (parameters, buffers), (images,))

        each = torch.vmap(one, in_dims=(0, 0, None if shared else 0))
        return each(self.parameters, self.buffers, images)

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """(R,). Cells come sorted by margin."""
        parts, weight = [], self.class_weight if self.weighted else None
        for margin in dict.fromkeys(self.margins):
            loss = functools.partial(lsoftmax.reference.lsoftmax_loss, margin=margin, weight=weight)
            own = [run for run, m in enumerate(self.margins) if m == margin]
            part = slice(own[0], own[-1] + 1)
            each = torch.vmap(lambda x, w, y, lam, loss=loss: loss(x, w, y, lam=lam))
            x, w = (matrix[part].to(self.dtype) for matrix in (features, self.weight))
            parts.append(each(x, w, labels[part], self.lam[part]))
        return torch.cat(parts)

    @torch.no_grad()
    def geometry(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosine to the own class (R, N), 0 for a zero row; |x| (R, N); |w| (R, C)."""
        features = features.float()
        own = self.weight.gather(1, labels.unsqueeze(2).expand(*labels.shape, features.shape[2]))
        cosines = F.cosine_similarity(features, own, dim=2)
        return cosines, features.norm(dim=2), self.weight.norm(dim=2)

    def step(self, losses: Tensor, cosines: Tensor, labels: Tensor) -> None:
        """Update all runs; their losses have no parameter in common."""
        low = cosines.mean(1) - cosines.std(1, unbiased=False)
        self.optimizer.zero_grad()
        losses.sum().backward()
        if self.clip is not None:
            self.clip_gradients(self.clip)
        self.optimizer.step()
        self.rates.step()
        for run, (schedule, margin) in enumerate(zip(self.schedules, self.margins, strict=True)):
            cosine = low[run]
            if schedule.num_classes is not None:
                cosine = schedule.count_classes(cosines[run], labels[run])
            schedule.commit(self.lam[run])
            schedule.observe(cosine, margin)
        self.lam = self.upcoming()

    def clip_gradients(self, norm: float) -> None:
        """As torch.nn.utils.clip_grad_norm_, each run by itself."""
        (group,) = self.optimizer.param_groups
        gradients = [parameter.grad for parameter in group["params"]]
        norms = torch.cat([gradient.flatten(1) for gradient in gradients], 1).norm(dim=1)
        factors = (norm / (norms + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


@torch.no_grad()
def measured(runs: Runs, split: Labelled) -> list[dict[str, Any]]:
    """Error in percent, mean angle to the own class in degrees, norms, classes never predicted."""
    runs.network.eval()
    features = torch.cat([runs.features(part, True) for part in split.test_images.split(500)], 1)
    labels = split.test_labels.expand(features.shape[:2])
    predicted = (features @ runs.weight.mT).argmax(2)
    cosines, input_norms, weight_norms = runs.geometry(features, labels)
    columns = {
        "error": 100 * (predicted != labels).double().mean(1),
        "angle": degrees(cosines),
        "input_norm": input_norms.mean(1),
        "zero_inputs": (input_norms < 1e-3).double().mean(1),
        "smallest_weight_norm": weight_norms.amin(1),
        "lam": runs.lam,
    }
    never = [split.classes - len(row.unique()) for row in predicted]
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {**dict(zip(columns, map(rounded, row), strict=True)), "never_predicted": count}
        for row, count in zip(rows, never, strict=True)
    ]


def as_schedule(lam: LambdaSchedule | float) -> LambdaSchedule:
    return lam if isinstance(lam, LambdaSchedule) else LambdaSchedule.constant(lam)


def degrees(cosines: Tensor) -> Tensor:
    """Mean angle of each run, (R, N) to (R,)."""
    return torch.rad2deg(cosines.clamp(-1, 1).acos()).mean(1)


def rounded(value: float) -> float | None:
    """To four digits: what a run and a plot need. None where there is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
