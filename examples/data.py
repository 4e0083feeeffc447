"""MNIST, CIFAR-10 and CIFAR-100 from the files they are published as, in a folder the user names.

Nothing is downloaded. Every loader looks for its files in the folder itself and where archives
unpack to inside it; where they are missing the error says which, and where they are usually found.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import packs


class MissingDataError(Exception):
    """The files of a data set are not in the folder; the text says what was expected."""

    def __init__(self, title: str, folder: Path, expected: Sequence[str], source: str) -> None:
        wanted = "".join(f"\n  {line}" for line in expected)
        super().__init__(
            f"{title}: expected in {folder}{wanted}\n"
            f"Usually found at {source}; name the folder with --data."
        )


class TooFewImagesError(ValueError):
    """A class would have no image to train on."""


@dataclass(frozen=True)
class Labelled:
    """Images (N, channels, height, width) uint8 and labels (N,) int64, to train and to test on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    def to(self, device: torch.device | str) -> Labelled:
        """All four tensors on a device."""
        train = self.train_images.to(device), self.train_labels.to(device)
        return Labelled(
            *train, self.test_images.to(device), self.test_labels.to(device), self.classes
        )

    def first(self, count: int) -> Labelled:
        """With only the first ``count`` images to train on."""
        train = self.train_images[:count], self.train_labels[:count]
        return Labelled(*train, self.test_images, self.test_labels, self.classes)

    def long_tailed(self, ratio: float) -> Labelled:
        """With class c of C to train on cut to its first n ratio^(-c / (C - 1)) images, n those
        of the largest class: the long-tailed CIFAR of Cui et al. (CVPR 2019).

        Raises:
            TooFewImagesError: the rarest class would have none.
        """
        counts = torch.bincount(self.train_labels, minlength=self.classes)
        decline = ratio ** (-torch.arange(self.classes).double() / (self.classes - 1))
        kept = (counts.max() * decline + 1e-9).long()  # 500 / 100 is 5
        if kept[-1] == 0:
            raise TooFewImagesError(
                f"long tail: expected a ratio of at most {counts.max()}, the images of the largest "
                f"class, got {ratio:g}"
            )
        of_class = [
            (self.train_labels == label).nonzero()[:count, 0] for label, count in enumerate(kept)
        ]
        chosen = torch.cat(of_class).sort().values
        return replace(
            self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen]
        )


def find(folder: Path, places: Sequence[str], names: Sequence[str]) -> list[Path]:
    """The files ``names``, gzipped or not, from the first of ``places`` in ``folder`` that has all
    of them; a name with a * stands for all that match. Empty where no place has them.
    """
    for place in places:
        found = []
        for name in names:
            plain, zipped = (folder.glob(f"{place}/{name}{end}") for end in ("", ".gz"))
            paths = sorted(filter(Path.is_file, plain)) or sorted(filter(Path.is_file, zipped))
            if not paths:
                break
            found += paths
        else:
            return found
    return []


# ---- MNIST ---------------------------------------------------------------------------------------

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def mnist(folder: Path) -> Labelled:
    """MNIST: 60,000 and 10,000 images (1, 28, 28) of ten digits, from its four idx files.

    Raises:
        MissingDataError: they are not in the folder.
        ValueError: one is no idx file, or cut short.
    """
    places = (".", "mnist", "MNIST", "MNIST/raw")
    paths = find(folder, places, MNIST_FILES)
    if not paths:
        raise MissingDataError(
            "MNIST",
            folder,
            [f"{', '.join(MNIST_FILES)} (or .gz)", f"there or in one of {', '.join(places[1:])}"],
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        )
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(read_idx(path)) for path in paths
    )
    return Labelled(
        train_images.unsqueeze(1),
        train_labels.long(),
        test_images.unsqueeze(1),
        test_labels.long(),
        10,
    )


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes: 0, 0, 8 (bytes), the number of dimensions, each in 32 bits, the data.

    Raises:
        ValueError: the file is something else, or was cut short.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: expected an idx file of bytes, got {content[:4]!r} at its start")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">i4").tolist())
    if len(content) != start + int(np.prod(shape)):
        raise ValueError(
            f"{path}: expected {start + int(np.prod(shape))} bytes for shape {shape}, got "
            f"{len(content)}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


# ---- CIFAR ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """One of the ways in which CIFAR is published: a folder, its files, what reads one of them."""

    place: str
    train: Sequence[str]
    test: Sequence[str]
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]]  # (N, 3, 32, 32), (N,)


def cifar(folder: Path, classes: int) -> Labelled:
    """CIFAR-10 or CIFAR-100 (fine labels): 50,000 and 10,000 images (3, 32, 32).

    Raises:
        MissingDataError: no version of it is in the folder.
        ValueError: a file is not what its name says.
    """
    for layout in CIFAR[classes]:
        places = (".", layout.place)
        train, test = find(folder, places, layout.train), find(folder, places, layout.test)
        if train and test:
            return Labelled(*_read_all(layout, train), *_read_all(layout, test), classes)
    raise MissingDataError(
        f"CIFAR-{classes}",
        folder,
        [
            f"{', '.join((*layout.train, *layout.test))}; there or in {layout.place}"
            for layout in CIFAR[classes]
        ],
        "https://www.cs.toronto.edu/~kriz/cifar.html (the python or the binary version, unpacked)",
    )


def _read_all(layout: Layout, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(layout.read(path) for path in paths), strict=True)
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)).long()


class _NumpyUnpickler(pickle.Unpickler):
    """Unpickles what CIFAR's files hold, dicts of arrays and lists, and refuses everything else:
    a pickle may name any function, and would call it.
    """

    _NAMES = {  # noqa: RUF012
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "numpy" or name not in self._NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in CIFAR's files")
        return self._NAMES[name]


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        batch = _NumpyUnpickler(file, encoding="bytes").load()
    labels = batch.get(b"fine_labels", batch.get(b"labels"))
    return batch[b"data"].reshape(-1, 3, 32, 32), np.array(labels)


def _read_binary(path: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label (CIFAR-10) or a coarse and a fine one (CIFAR-100), and the pixels."""
    content = np.fromfile(path, np.uint8)
    record = label_bytes + 3 * 32 * 32
    if content.size == 0 or content.size % record:
        raise ValueError(f"{path}: expected records of {record} bytes, got {content.size} bytes")
    records = content.reshape(-1, record)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]


BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR = {
    10: (
        Layout("cifar-10-batches-py", BATCHES, ["test_batch"], _read_pickle),
        Layout(
            "cifar-10-batches-bin",
            [f"{name}.bin" for name in BATCHES],
            ["test_batch.bin"],
            lambda path: _read_binary(path, 1),
        ),
    ),
    100: (
        Layout("cifar-100-python", ["train"], ["test"], _read_pickle),
        Layout("cifar-100-binary", ["train.bin"], ["test.bin"], lambda path: _read_binary(path, 2)),
        Layout(
            "cifar100",
            ["cifar100_train_*.npy2.xz"],
            ["cifar100_test_*.npy2.xz"],
            packs.read_colour_shard,
        ),
    ),
}
