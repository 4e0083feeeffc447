"""An experiment on labelled images: errors by plain logits, as a classifier is used, and angles."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from data import Labelled
from experiment import (
    Results,
    Row,
    Setting,
    chosen,
    describe,
    figures_of,
    prepare,
    run_all,
    table,
)
from figures import draw_angles, draw_training
from training import Augment, Log, features_of

RARE = 20  # images to train on: few-shot, in Liu et al. (CVPR 2019)
COLUMNS = {
    "test_error": "test error, %",
    "angle": "angle to the own class, degrees",
    "other_angle": "to the nearest other, degrees",
    "unanswered": "classes never answered",
    "rare_error": f"test error of classes of fewer than {RARE} images, %",
}
ANGLE_BINS = 60  # of 3 degrees


def compare(
    args: argparse.Namespace,
    data: Labelled,
    setting: Setting,
    *,
    augment: Augment | None = None,
    long_tail: float | None = None,
) -> list[Row]:
    """Train with every margin and seed, print the table, draw the pictures.

    ``long_tail``: the ratio that the data were made unequal with, to be told.
    """
    torch.backends.cudnn.deterministic = True
    setting = chosen(setting, args)
    data = data.to(args.device)
    size, test = (len(data.train_labels), data.classes), len(data.test_labels)
    settings = describe(args, setting, [size], test=test)
    settings |= {"augment": augment is not None, "long_tail": long_tail}
    results = Results(args.output, settings)
    rare = (torch.bincount(data.train_labels, minlength=data.classes) < RARE).nonzero().squeeze(1)

    def train(run: Row, checkpoint: Path, after_epoch: Callable[[Log], object]) -> Row:
        training = prepare(
            setting,
            data.train_images,
            data.train_labels,
            data.classes,
            **run,
            augment=augment,
            amp=args.amp,
        ).run(after_epoch, checkpoint)
        features = features_of(training.network, data.test_images)
        weight = training.criterion.linear.weight.detach()
        return {**measure(features, weight, data.test_labels, rare), **figures_of(training)}

    # Seeds outermost: an experiment that is broken off has compared all margins.
    runs = [{"margin": m, "seed": s} for s in range(args.seeds) for m in args.margins]
    rows = run_all(results, runs, setting.recipe.epochs, train)
    print(f"\n{table(rows, COLUMNS)}\n")
    print(f"Classified by plain logits. Mean ± standard deviation, seeds: {args.seeds}.")
    draw_angles(args.output / "angles.png", rows)
    draw_training(args.output / "training.png", rows)
    print(f"Results and pictures: {args.output.resolve()}")
    return rows


def measure(features: Tensor, weight: Tensor, labels: Tensor, rare: Tensor | None = None) -> Row:
    """The test error, percent, the angles to the own and the nearest other class, degrees, how
    many of the classes are the answer to no image, and the error of ``rare`` classes, if any.
    """
    answers = F.linear(features, weight).argmax(1)
    cosines = F.normalize(features.double()) @ F.normalize(weight.double()).T
    own = cosines.gather(1, labels.unsqueeze(1)).squeeze(1)
    other = cosines.scatter(1, labels.unsqueeze(1), -2.0).amax(1)
    angles = [torch.rad2deg(torch.acos(c.clamp(-1, 1))) for c in (own, other)]
    counts = [torch.histc(a.cpu(), ANGLE_BINS, 0, 180).long().tolist() for a in angles]
    wrong = (answers != labels).double()
    figures = {} if rare is None else {"rare_error": wrong[torch.isin(labels, rare)]}
    return {
        "test_error": 100 * wrong.mean().item(),
        "angle": angles[0].mean().item(),
        "other_angle": angles[1].mean().item(),
        "unanswered": len(weight) - len(answers.unique()),
        "angle_counts": dict(zip(("own", "other"), counts, strict=True)),
        **{name: 100 * part.mean().item() for name, part in figures.items() if len(part) > 0},
    }
