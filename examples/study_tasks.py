"""What the trainability study trains: small tasks, and the annealings compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import digits
from balance import BATCHES, DEFERRED, WEIGHTS
from data import Labelled, MissingDataError, mnist
from lsoftmax import LambdaSchedule
from networks import ACTIVATIONS, connected, initialised

for_steps, by_angle = LambdaSchedule.for_steps, LambdaSchedule.by_angle
CLIPS = (5, 1)
# Tasks of classes of unequal size: as they are, and the usual remedies.
UNEQUAL = {
    "digits-unequal": None,
    "digits-unequal-weighted": WEIGHTS,
    "digits-unequal-deferred": DEFERRED,
    "digits-unequal-balanced": BATCHES,
}


@dataclass(frozen=True)
class Task:
    """A data set, a network from its images to ``features`` numbers, and how long it is trained."""

    load: Callable[[Path | None], Labelled]  # images float32 in [0, 1]
    network: Callable[[str], nn.Sequential]  # of an activation, "relu" or "prelu"
    features: int
    batch: int
    epochs: int
    clip: int | None = None  # the norm that the gradient of a training is cut down to
    balance: str | None = None  # one of balance.WAYS


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    task: str
    margin: int
    annealing: str
    lr: float
    seed: int
    activation: str = "relu"
    optimizer: str = "sgd"
    dtype: str = "float32"  # or bfloat16: of the loss's two matrices, as under autocast

    @property
    def key(self) -> str:
        """Its name in the results and for ``--cells``."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    @property
    def group(self) -> tuple[str, ...]:
        """What cells must share to be trained side by side."""
        return self.task, f"{self.optimizer} {self.lr}", self.activation, self.dtype


# By name: a schedule, or a constant, for a number of training steps and of classes.
ANNEALINGS: dict[str, Callable[[int, int], LambdaSchedule | float]] = {
    "softmax": lambda steps, classes: 0.0,  # for m = 1
    "none": lambda steps, classes: 0.0,
    "constant 1": lambda steps, classes: 1.0,
    "constant 5": lambda steps, classes: 5.0,
    "authors": lambda steps, classes: LambdaSchedule(1000.0, 2.5e-5, 35.0),
    "SphereFace": lambda steps, classes: LambdaSchedule(1000.0, 0.12, 1.0, 5.0),
    # 100 * 0.99^t: Caffe's rule comes as near as one likes
    "0.99^t": lambda steps, classes: LambdaSchedule(100.0, 1e-8, -math.log(0.99) / 1e-8),
    "for_steps, keep=None": lambda steps, classes: for_steps(steps, keep=None),
    "for_steps, keep=0.6": lambda steps, classes: for_steps(steps, keep=0.6),
    "for_steps, keep=0.7": lambda steps, classes: for_steps(steps, keep=0.7),
    "by_angle, keep=0.7": lambda steps, classes: by_angle(keep=0.7),
    "for_steps, minimum=5": lambda steps, classes: for_steps(steps, minimum=5.0),
    "for_steps, num_classes=C": lambda steps, classes: for_steps(steps, num_classes=classes),
    "by_angle, num_classes=C": lambda steps, classes: by_angle(num_classes=classes),
    "for_steps": lambda steps, classes: for_steps(steps),
    "by_angle": lambda steps, classes: by_angle(),
}


def load_digits(folder: Path | None) -> Labelled:
    """scikit-learn's digits: 1,297 to train and 500 to test on."""
    return digits.load_data(torch.device("cpu"))


def load_unequal(folder: Path | None) -> Labelled:
    """The same with 120 images of each digit below 5, and 3 of each from 5 on; tested on all."""
    d = load_digits(folder)
    counts = [120 if digit < 5 else 3 for digit in range(10)]
    chosen = torch.cat(
        [(d.train_labels == digit).nonzero()[:n, 0] for digit, n in enumerate(counts)]
    )
    return replace(d, train_images=d.train_images[chosen], train_labels=d.train_labels[chosen])


def load_mnist(folder: Path | None) -> Labelled:
    """The first 12,800 images of MNIST, and all 10,000 to test on, reduced to 14 x 14."""
    m = mnist(named(folder, "MNIST")).first(12_800)
    train, test = (F.avg_pool2d(x.float() / 255, 2) for x in (m.train_images, m.test_images))
    return Labelled(train, m.train_labels, test, m.test_labels, 10)


def load_omniglot(folder: Path | None) -> Labelled:
    """The first 200 characters of Omniglot's images_background, reduced to 15 x 15: of each, 15
    drawings to train and 5 to test on.

    Raises:
        MissingDataError: the array is not in the folder.
    """
    name, classes, train = "omniglot/images_background.npz", 200, 15
    path = named(folder, "Omniglot") / name
    if not path.is_file():
        what = f"{name} with `images`: bool (964, 20, 105, 105), True = paper"
        source = "https://github.com/brendenlake/omniglot (images_background.zip, as one array)"
        raise MissingDataError("Omniglot", path.parents[1], [what], source)
    ink = 1 - torch.from_numpy(np.load(path)["images"][:classes]).float()
    images = F.avg_pool2d(ink, 7).unsqueeze(2)
    labels = torch.arange(classes).unsqueeze(1).expand(images.shape[:2])
    return Labelled(
        *(images[:, :train].flatten(0, 1), labels[:, :train].flatten()),
        *(images[:, train:].flatten(0, 1), labels[:, train:].flatten()),
        classes,
    )


def named(folder: Path | None, title: str) -> Path:
    if folder is None:
        raise SystemExit(f"{title}: name the folder that holds it with --data")
    return folder


def perceptron(pixels: int, hidden: int, features: int) -> Callable[[str], nn.Sequential]:
    """(N, 1, height, width) to (N, features)."""

    def network(activation: str) -> nn.Sequential:
        return initialised(
            nn.Flatten(),
            *connected(pixels, hidden, activation),
            *connected(hidden, features, activation),
        )

    return network


def plain(activation: str) -> nn.Sequential:
    """The network of the README: one layer, and nothing that keeps features at their size."""
    return initialised(nn.Flatten(), nn.Linear(64, 128), ACTIVATIONS[activation]())


TASKS = {
    "digits": Task(load_digits, perceptron(64, 64, 32), 32, batch=64, epochs=20),
    "digits-long": Task(load_digits, perceptron(64, 64, 32), 32, batch=64, epochs=100),
    "digits-unequal": Task(load_unequal, perceptron(64, 64, 32), 32, batch=64, epochs=60, clip=5),
    "mnist": Task(load_mnist, perceptron(196, 64, 64), 64, batch=128, epochs=4),
    "mnist-long": Task(load_mnist, perceptron(196, 64, 64), 64, batch=128, epochs=20),
    "omniglot": Task(load_omniglot, perceptron(225, 128, 64), 64, batch=64, epochs=15),
    "omniglot-long": Task(load_omniglot, perceptron(225, 128, 64), 64, batch=64, epochs=75),
    "digits-plain": Task(load_digits, plain, 128, batch=64, epochs=100),
}
for name, balance in UNEQUAL.items():
    TASKS[name] = replace(TASKS["digits-unequal"], balance=balance)
for name in ("digits-plain", "digits-long", "mnist-long", "omniglot"):
    for clip in CLIPS:
        TASKS[f"{name}-clip{clip}"] = replace(TASKS[name], clip=clip)


def build(cell: Cell, classes: int) -> tuple[nn.Sequential, nn.Linear]:
    """Network and classifier, initialised as He et al. do; the same for all losses of a seed."""
    task = TASKS[cell.task]
    torch.manual_seed(cell.seed)
    network = task.network(cell.activation)
    return network, cast(nn.Linear, initialised(nn.Linear(task.features, classes, bias=False))[0])
