"""An experiment on pairs of unseen identities: train to classify known ones, compare features."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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
from figures import draw_roc, draw_training
from pairs import Verification
from sampled import group_of_one
from training import Augment, Log, features_of
from verification import FAR_GRID, accuracy, best_threshold, cosines, curve, fold_accuracies


def columns(negatives: int) -> dict[str, str]:
    """Figures and their titles, as far as that many different pairs resolve a FAR."""
    rates = {"tar_1e-2": (0.01, "TAR at FAR 1%, %"), "tar_1e-3": (0.001, "TAR at FAR 0.1%, %")}
    resolved = {key: words for key, (rate, words) in rates.items() if rate * negatives >= 1}
    return {"accuracy": "accuracy, %", "eer": "EER, %", **resolved}


def compare(
    args: argparse.Namespace,
    data: Verification,
    setting: Setting,
    *,
    folds: int | None = None,
    least: int = 1,
    augment: Augment | None = None,
) -> list[Row]:
    """Train with every margin and seed, print the table, draw the pictures.

    Args:
        args: of the command line.
        data: what to train on and to test on.
        setting: how to train.
        folds: None: the identities trained on are in no pair; one training is tested on all folds.
            Else that many folds are tested, each by a training of its own, without its people.
        least: identities with fewer images are not trained on.
        augment: as for :class:`Training`.
    """
    torch.backends.cudnn.deterministic = True
    setting = chosen(setting, args)
    images, test_images = data.images.to(args.device), data.test_images.to(args.device)
    same, fold_of = data.pairs.same.numpy(), data.pairs.fold.numpy()
    tested_folds = [None] if folds is None else np.unique(fold_of).tolist()
    of_folds = [known(data, fold, least)[1] for fold in tested_folds]
    if min(map(len, of_folds)) == 0:
        raise SystemExit(f"--least {least}: nobody has as many images")
    sizes = [(len(labels), int(labels.max()) + 1) for labels in of_folds]
    more = {"pairs": len(same)} | ({} if folds is None else {"least": least})
    if args.sample_rate < 1:
        more["sample_rate"] = args.sample_rate
    results = Results(args.output, describe(args, setting, sizes, **more))

    def train(run: Row, checkpoint: Path, after_epoch: Callable[[Log], object]) -> Row:
        trained_on, labels = known(data, run.get("fold"), least)
        training = prepare(
            setting,
            images[trained_on.to(args.device)],
            labels.to(args.device),
            int(labels.max()) + 1,
            run["margin"],
            run["seed"],
            augment=augment,
            amp=args.amp,
            sample_rate=args.sample_rate,
        ).run(after_epoch, checkpoint)
        scores = cosines(features_of(training.network, test_images), data.pairs)
        tested = np.ones_like(same)
        if "fold" in run:
            tested = fold_of == run["fold"]
            threshold = best_threshold(scores[~tested], same[~tested])
            accuracies = [accuracy(scores[tested], same[tested], threshold)]
        else:
            accuracies = fold_accuracies(scores, data.pairs)
        return {
            "identities": int(labels.max()) + 1,
            "images": len(labels),
            "accuracy": float(np.mean(accuracies)),
            **curve(scores[tested], same[tested]),
            **figures_of(training),
        }

    runs = [{"margin": m, "seed": s} for s in range(args.seeds) for m in args.margins]
    if folds is not None:
        runs = [{**run, "fold": fold} for fold in range(folds) for run in runs]
    with group_of_one(args.device) if args.sample_rate < 1 else nullcontext():
        rows = run_all(results, runs, setting.recipe.epochs, train)
    different = fold_of[~same]
    negatives = len(different) if folds is None else int(np.bincount(different).max())
    print(f"\n{table(rows, columns(negatives))}\n")
    print(f"Cosine similarity. Mean ± standard deviation, seeds: {args.seeds}.", end=" ")
    print(f"Folds: {folds} of 10." if folds else "Ten folds.")
    draw_roc(args.output / "roc.png", rows, FAR_GRID, negatives)
    draw_training(args.output / "training.png", rows)
    print(f"Results and pictures: {args.output.resolve()}")
    return rows


def known(data: Verification, fold: int | None, least: int) -> tuple[Tensor, Tensor]:
    """Images to train on, (N,) indices, and their labels (N,), counted from 0.

    With a ``fold``, nobody is among them who is in one of its pairs.
    """
    identities = data.identities
    keep = torch.bincount(identities)[identities] >= least
    if fold is not None:
        there = data.pairs.fold == fold
        pair_images = torch.cat([data.pairs.left[there], data.pairs.right[there]])
        keep &= ~torch.isin(identities, data.test_identities[pair_images])
    chosen = keep.nonzero().squeeze(1)
    return chosen, torch.unique(identities[chosen], return_inverse=True)[1]
