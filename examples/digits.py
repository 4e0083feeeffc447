"""Softmax beside L-Softmax on handwritten digits: what the margin does to features and errors.

Trains one small network on scikit-learn's digits (8 x 8 pixels, no download) with margins 1 (plain
softmax), 2, 3 and 4, prints a table, and draws the features as figure 2 of Liu et al. (ICML 2016)
does: the last layer before the classifier has two outputs, so a digit's feature is a point in the
plane. For one seed, all margins share initial weights and the order of the data.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor, nn

import lsoftmax
from classification import COLUMNS, measure
from data import Labelled
from experiment import table
from extras import needed
from files import write_json
from options import device_of, margin_of, positive
from training import Recipe, Training, features_of

with needed():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm

    from lsoftmax import plots
    from lsoftmax.digits import annealing
    from lsoftmax.plots import name_of

TEST_SIZE = 500


@dataclass(frozen=True)
class Result:
    """One trained network: its figures, and on the CPU what the picture needs of it."""

    row: dict[str, float]  # margin, seed, test_error (%), angle (degrees), seconds
    features: Tensor  # (TEST_SIZE, 2)
    class_vectors: Tensor  # (10, 2)


def load_data(device: torch.device) -> Labelled:
    """The 1797 digits, float32 (N, 1, 8, 8) in [0, 1]; the split is the same in every run, with all
    classes equally in both parts.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_SIZE, stratify=digits.target, random_state=0
    )
    return Labelled(images[train], labels[train], images[test], labels[test], 10).to(device)


def build_network() -> nn.Sequential:
    """(N, 1, 8, 8) to features (N, 2). No activation at the end: features use the whole plane."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *(nn.Linear(32 * 2 * 2, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, 2),
    )


def run(
    data: Labelled, margin: int, seed: int, epochs: int, after_epoch: Callable[[], object]
) -> Result:
    """Train once, and measure on the test set: by plain logits, as a classifier is used."""
    start = time.perf_counter()
    recipe = Recipe(epochs, batch=64, lr=0.05, weight_decay=2e-3)
    schedule = annealing(recipe.steps(len(data.train_labels)))
    torch.manual_seed(seed)
    network = build_network()
    # The one line that differs from softmax, nn.LinearCrossEntropyLoss(2, 10, bias=False):
    criterion = lsoftmax.LSoftmaxLoss(2, data.classes, margin=margin, lam=schedule)
    device = data.train_labels.device
    training = Training(
        network.to(device), criterion.to(device), data.train_images, data.train_labels, recipe, seed
    )
    training.run(lambda log: after_epoch())
    features = features_of(network, data.test_images)
    class_vectors = criterion.linear.weight.detach()
    figures = measure(features, class_vectors, data.test_labels)
    return Result(
        row={
            "margin": margin,
            "seed": seed,
            "test_error": figures["test_error"],
            "angle": figures["angle"],
            "seconds": time.perf_counter() - start,
        },
        features=features.cpu(),
        class_vectors=class_vectors.cpu(),
    )


def typical(results: Sequence[Result]) -> list[Result]:
    """The results of the seed whose angles are nearest to the means over all seeds."""

    def distance(seed: float) -> float:
        return sum(abs(r.row["angle"] - means[r.row["margin"]]) for r in of_seed[seed])

    rows = [result.row for result in results]
    of_seed = {row["seed"]: [r for r in results if r.row["seed"] == row["seed"]] for row in rows}
    means = {
        row["margin"]: statistics.mean(r["angle"] for r in rows if r["margin"] == row["margin"])
        for row in rows
    }
    return of_seed[min(of_seed, key=distance)]


def panel(result: Result) -> plots.Features:
    """A result as the picture shows it."""
    figures = f"test error {result.row['test_error']:.1f}%, mean angle {result.row['angle']:.1f}°"
    title = f"{name_of(int(result.row['margin']))}\n{figures}"
    return plots.Features(result.features, result.class_vectors, title)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. What would fail after the training is refused here, before it."""
    parser = argparse.ArgumentParser(
        description="Train on handwritten digits with softmax and L-Softmax; print a table and "
        "save a picture of the 2-D features.",
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1 and so on (default: %(default)s)")
    add("--epochs", type=positive, default=30, help="fewer may lose a class at m = 4 (%(default)s)")
    add("--seeds", type=positive, default=5, help="trainings a margin (%(default)s)")
    add("--margins", type=margin_of, nargs="+", default=[1, 2, 3, 4], help="1 is softmax (1 2 3 4)")
    add("--output", type=Path, default=Path("build/digits.png"), help="the picture (%(default)s)")
    add("--json", type=Path, help="also save the figures of every training, in this file")
    args = parser.parse_args(arguments)
    args.margins = list(dict.fromkeys(args.margins))
    args.device = device_of(args.device, parser)
    for path in filter(None, (args.output, args.json)):
        if os.path.isdir(path):
            parser.error(f"{path}: expected a file to write, this is a directory")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            NamedTemporaryFile(dir=path.parent, prefix=path.name).close()
        except OSError as error:
            parser.error(f"{path} can't be written: {error}")
    try:
        plots.format_of(args.output)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    args = parse(arguments)
    compiled = args.device.type == "cuda" and lsoftmax.cuda_available()
    print(f"Device {args.device}, L-Softmax by {'CUDA kernels' if compiled else 'plain PyTorch'}")
    torch.backends.cudnn.deterministic = True
    # So small a network gains nothing from two threads, and waits where one is busy.
    torch.set_num_threads(1)
    data = load_data(args.device)
    run(data, margin=1, seed=0, epochs=1, after_epoch=lambda: None)  # libraries start up, untimed

    # Seeds outermost: a machine that slows down in between slows all margins alike.
    jobs = [(margin, seed) for seed in range(args.seeds) for margin in args.margins]
    results = []
    with tqdm(total=len(jobs) * args.epochs, unit="epoch") as bar:
        for margin, seed in jobs:
            bar.set_description(f"{name_of(margin)}, seed {seed}")
            results.append(run(data, margin, seed, args.epochs, bar.update))

    rows = [result.row for result in results]
    columns = {key: COLUMNS[key] for key in ("test_error", "angle")}
    shown = typical(results)
    figure = plots.draw_features([panel(r) for r in shown], data.test_labels.tolist())
    plots.save(figure, args.output)  # before anything is printed, to which nobody may listen
    if args.json:
        write_json(args.json, rows)
    print(f"\n{table(rows, {**columns, 'seconds': 'seconds a training'})}\n")
    print("Angle: between the feature of a test digit and the vector of its class.", end=" ")
    print(f"Mean ± standard deviation, seeds: {args.seeds}." if args.seeds > 1 else "One seed.")
    seed = shown[0].row["seed"]
    print(f"Picture of the features (seed {seed}, the most typical): {args.output.resolve()}")
    if args.json:
        print(f"Figures: {args.json.resolve()}")
    return results


if __name__ == "__main__":
    main()
