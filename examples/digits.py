"""Softmax beside L-Softmax on handwritten digits: what the margin does to features and errors.

Trains one small network on scikit-learn's digits (8 x 8 pixels, no download) with margins 1 (plain
softmax), 2, 3 and 4, prints a table, and draws the features as figure 2 of Liu et al. (ICML 2016)
does: the last layer before the classifier has two outputs, so a digit's feature is a point in the
plane. For one seed, all margins share initial weights and the order of the data.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsoftmax

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise SystemExit(
        f'This example needs {error.name}, which is not installed: pip install "lsoftmax[examples]"'
    ) from None

CLASSES, TEST_SIZE, BATCH = 10, 500, 64
COLOURS = [f"C{digit}" for digit in range(CLASSES)]  # matplotlib's default, tab10


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) float32 in [0, 1] and labels (N,) int64, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Result:
    """One trained network: its figures, and on the CPU what the picture needs of it."""

    margin: int
    seed: int
    test_error: float  # percent
    angle: float  # degrees, mean over the test set
    seconds: float  # of training
    features: Tensor  # (TEST_SIZE, 2)
    class_vectors: Tensor  # (CLASSES, 2)


def load_data(device: torch.device) -> Digits:
    """The 1797 digits; the split is the same in every run, with all classes equally in both."""
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1).to(device)
    labels = torch.from_numpy(digits.target).long().to(device)
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_SIZE, stratify=digits.target, random_state=0
    )
    return Digits(images[train], labels[train], images[test], labels[test])


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


def annealing(steps: int) -> lsoftmax.LambdaSchedule:
    """From lam = 1000, where every margin is plain softmax, to 0.3 after 70% of the steps.

    Classes must lie apart before the margin pulls them together: switched on early, it makes
    features and class vectors shrink instead, and a class is lost. Hence a curve that falls evenly
    (a high power), measured in the length of the training, and a floor above 0.
    """
    base, power, minimum = 1000.0, 4.0, 0.3
    gamma = ((base / minimum) ** (1 / power) - 1) / (0.7 * steps)
    return lsoftmax.LambdaSchedule(base, gamma, power, minimum)


def train(
    data: Digits, margin: int, seed: int, epochs: int, after_epoch: Callable[[], object]
) -> tuple[nn.Sequential, lsoftmax.LSoftmaxLoss]:
    """A network and its loss, whose `linear` is the classifier, after `epochs` of SGD."""
    device, count = data.train_labels.device, len(data.train_labels)
    steps = epochs * (count // BATCH)
    torch.manual_seed(seed)
    network = build_network().to(device)
    # The one line that differs from softmax, nn.LinearCrossEntropyLoss(2, CLASSES, bias=False):
    criterion = lsoftmax.LSoftmaxLoss(2, CLASSES, margin=margin, lam=annealing(steps)).to(device)

    parameters = [*network.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    for _ in range(epochs):
        shuffled = torch.randperm(count, generator=order).to(device)
        for batch in shuffled[: count // BATCH * BATCH].split(BATCH):
            loss = criterion(network(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        after_epoch()
    return network.eval(), criterion.eval()


def angles(features: Tensor, class_vectors: Tensor, labels: Tensor) -> Tensor:
    """Angle (N,) in degrees between each feature and the vector of its own class."""
    cosines = F.cosine_similarity(features, class_vectors[labels])
    return torch.rad2deg(torch.acos(cosines.clamp(-1, 1)))


@torch.no_grad()
def run(
    data: Digits, margin: int, seed: int, epochs: int, after_epoch: Callable[[], object]
) -> Result:
    """Train once, and measure on the test set: by plain logits, as a classifier is used."""
    start = time.perf_counter()
    with torch.enable_grad():
        network, criterion = train(data, margin, seed, epochs, after_epoch)
    features = network(data.test_images)
    wrong = criterion.linear(features).argmax(1) != data.test_labels
    class_vectors = criterion.linear.weight
    return Result(
        margin=margin,
        seed=seed,
        test_error=100 * wrong.float().mean().item(),  # waits for the device: time it after
        angle=angles(features, class_vectors, data.test_labels).mean().item(),
        seconds=time.perf_counter() - start,
        features=features.cpu(),
        class_vectors=class_vectors.cpu(),
    )


def name(margin: int) -> str:
    """What a margin is called in the table and the picture."""
    return "softmax" if margin == 1 else f"L-Softmax, m = {margin}"


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and where there are several values their standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def table(results: Sequence[Result]) -> str:
    """One row a margin: mean and standard deviation over the seeds, median seconds a training."""
    lines = [f"{'loss':<18}{'test error, %':>16}{'angle, degrees':>18}{'seconds':>10}"]
    for margin in dict.fromkeys(result.margin for result in results):
        rows = [result for result in results if result.margin == margin]
        error = mean_and_spread([row.test_error for row in rows])
        angle = mean_and_spread([row.angle for row in rows])
        seconds = statistics.median(row.seconds for row in rows)
        lines.append(f"{name(margin):<18}{error:>16}{angle:>18}{seconds:>10.1f}")
    return "\n".join(lines)


def typical(results: Sequence[Result]) -> list[Result]:
    """The results of the seed whose angles are nearest to the means over all seeds."""

    def distance(seed: int) -> float:
        return sum(abs(result.angle - means[result.margin]) for result in of_seed[seed])

    of_seed = {r.seed: [s for s in results if s.seed == r.seed] for r in results}
    of_margin = {r.margin: [s.angle for s in results if s.margin == r.margin] for r in results}
    means = {margin: statistics.mean(values) for margin, values in of_margin.items()}
    return of_seed[min(of_seed, key=distance)]


def plot(results: Sequence[Result], labels: Tensor) -> bytes:
    """A PNG with one panel a result: test features by class, class vectors as rays with digits."""
    figure = Figure(figsize=(3.6 * len(results), 4.3), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    colours = [COLOURS[label] for label in labels.tolist()]
    for axes, result in zip(panels, results, strict=True):
        radius = 1.05 * result.features.norm(dim=1).max().item()
        for digit, (x, y) in enumerate(F.normalize(result.class_vectors).tolist()):
            axes.plot([0, radius * x], [0, radius * y], color=COLOURS[digit], lw=1, alpha=0.6)
            label = axes.text(1.1 * radius * x, 1.1 * radius * y, str(digit), color=COLOURS[digit])
            label.set(ha="center", va="center", weight="bold")
        axes.scatter(*result.features.T.tolist(), c=colours, s=7, linewidths=0, zorder=2)
        axes.set_title(
            f"{name(result.margin)}\n"
            f"test error {result.test_error:.1f}%, mean angle {result.angle:.1f}°",
            fontsize=10.5,
        )
        limit = 1.2 * radius  # room for the digits
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_color("0.8")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


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
    add("--margins", type=positive, nargs="+", default=[1, 2, 3, 4], help="1 is softmax (1 2 3 4)")
    add("--output", type=Path, default=Path("build/digits.png"), help="the picture (%(default)s)")
    add("--json", type=Path, help="also save the figures of every training, in this file")
    args = parser.parse_args(arguments)
    args.margins = list(dict.fromkeys(args.margins))
    try:
        args.device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    for path in filter(None, (args.output, args.json)):
        if path.is_dir():
            parser.error(f"{path}: expected a file to write, this is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
    return args


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    args = parse(arguments)
    compiled = args.device.type == "cuda" and lsoftmax.cuda_available()
    print(f"Device {args.device}, L-Softmax by {'CUDA kernels' if compiled else 'plain PyTorch'}")
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(
        1
    )  # so small a network gains nothing from two, and waits where one is busy
    data = load_data(args.device)
    train(data, margin=1, seed=0, epochs=1, after_epoch=lambda: None)  # libraries start up, untimed

    # Seeds outermost: a machine that slows down in between slows all margins alike.
    jobs = [(margin, seed) for seed in range(args.seeds) for margin in args.margins]
    results = []
    with tqdm(total=len(jobs) * args.epochs, unit="epoch") as bar:
        for margin, seed in jobs:
            bar.set_description(f"{name(margin)}, seed {seed}")
            results.append(run(data, margin, seed, args.epochs, bar.update))

    print(f"\n{table(results)}\n")
    print("Angle: between the feature of a test digit and the vector of its class.", end=" ")
    print(f"Mean ± standard deviation, seeds: {args.seeds}." if args.seeds > 1 else "One seed.")
    shown = typical(results)
    write(args.output, plot(shown, data.test_labels.cpu()))
    print(
        f"Picture of the features (seed {shown[0].seed}, the most typical): {args.output.resolve()}"
    )
    if args.json:
        figures = ("margin", "seed", "test_error", "angle", "seconds")
        rows = [{key: getattr(result, key) for key in figures} for result in results]
        write(args.json, json.dumps(rows, indent=1).encode())
        print(f"Figures: {args.json.resolve()}")
    return results


if __name__ == "__main__":
    main()
