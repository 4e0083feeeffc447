"""LFW and Omniglot: images of known identities to train on, and pairs of unseen ones to tell apart.

The public layouts, or packs that hold the same in fewer files; in a folder the user names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import packs
from data import MissingDataError
from extras import needed

with needed():
    from tqdm import tqdm

LFW_FOLDERS = ("lfw-deepfunneled", "lfw_funneled", "lfw")
LFW_PACK = "lfw_deepfunneled_gray64.npy2.xz"
LFW_SOURCE = "http://vis-www.cs.umass.edu/lfw/ (lfw-deepfunneled.tgz and pairs.txt)"
LFW_PIXELS = 64

OMNIGLOT_SOURCE = "https://github.com/brendenlake/omniglot/tree/master/python"
FOLDS, PAIRS = 10, 300  # of each kind in a fold, as LFW has them
DRAWINGS = 20  # of each character of Omniglot


@dataclass(frozen=True)
class Pairs:
    """Pairs of images: indices (P,), whether both are of one identity, and the fold."""

    left: Tensor
    right: Tensor
    same: Tensor
    fold: Tensor


@dataclass(frozen=True)
class Verification:
    """Images (N, 1, height, width) uint8 with identities (N,), and pairs among ``test_images``."""

    images: Tensor
    identities: Tensor
    test_images: Tensor
    test_identities: Tensor
    pairs: Pairs


# ---- LFW -----------------------------------------------------------------------------------------


def lfw(folder: Path) -> Verification:
    """LFW, the centre of each deep-funnelled picture in 64 x 64 greys, and its ten folds of pairs.

    The images to train on and to test on are the same: which people are whose is the caller's care.

    Raises:
        MissingDataError: images or pairs.txt are not in the folder.
        ValueError: pairs.txt names an image that is not there.
    """
    for place in (folder, folder / "lfw"):
        if (place / LFW_PACK).is_file() and (place / "pairs.txt").is_file():
            images, names = packs.read_grey_shard(place / LFW_PACK)
            return _lfw(torch.from_numpy(images), names.tolist(), place / "pairs.txt")
    for place in (folder / name for name in (*LFW_FOLDERS, ".")):
        paths = sorted(place.glob("*/*_[0-9][0-9][0-9][0-9].jpg"))
        lists = [p for p in (place / "pairs.txt", folder / "pairs.txt") if p.is_file()]
        if paths and lists:
            names = [path.stem for path in paths]
            return _lfw(_read_faces(paths), names, lists[0])
    raise MissingDataError(
        "LFW",
        folder,
        [
            f"pairs.txt, and {'/, '.join(LFW_FOLDERS)}/ with Person_Name/Person_Name_0001.jpg",
            f"or {LFW_PACK} with pairs.txt, there or in lfw",
        ],
        LFW_SOURCE,
    )


def _read_faces(paths: Sequence[Path]) -> Tensor:
    """The middle half of each picture, as greys of LFW_PIXELS x LFW_PIXELS."""
    with needed():
        from PIL import Image
    faces = []
    for path in tqdm(paths, unit="face", desc="LFW"):
        with Image.open(path) as picture:
            width, height = picture.size
            x, y = (width - width * 128 // 250) // 2, (height - height * 128 // 250) // 2
            grey = picture.convert("L").crop((x, y, width - x, height - y))
            faces.append(np.asarray(grey.resize((LFW_PIXELS, LFW_PIXELS), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(faces)).unsqueeze(1)


def _lfw(images: Tensor, names: Sequence[str], pairs_file: Path) -> Verification:
    people = [name[:-5] for name in names]  # without _0001
    numbers = {person: number for number, person in enumerate(dict.fromkeys(people))}
    identities = torch.tensor([numbers[person] for person in people])
    pairs = read_pairs(pairs_file, {name: index for index, name in enumerate(names)})
    return Verification(images, identities, images, identities, pairs)


def read_pairs(path: Path, index_of: dict[str, int]) -> Pairs:
    """LFW's pairs.txt: the number of folds and of pairs of a kind in each; then a pair a line,
    ``person i j`` or ``person i other j``.

    Raises:
        ValueError: it has not the number of lines it says, or names an image that is not there.
    """
    first, *lines = path.read_text().splitlines()
    folds, count = (int(number) for number in first.split())
    lines = [line for line in lines if line.strip()]
    if len(lines) != 2 * folds * count:
        raise ValueError(f"{path}: expected {2 * folds * count} pairs, got {len(lines)}")
    rows = []
    for number, line in enumerate(lines):
        words = line.split()
        left, right = (words[0], words[1]), (words[-2] if len(words) == 4 else words[0], words[-1])
        try:
            i, j = (index_of[f"{person}_{int(which):04}"] for person, which in (left, right))
        except KeyError as error:
            raise ValueError(f"{path}: the image {error} of {line!r} is not there") from None
        rows.append((i, j, len(words) == 3, number // (2 * count)))
    i, j, same, fold = torch.tensor(rows).T
    return Pairs(i, j, same.bool(), fold)


# ---- Omniglot ------------------------------------------------------------------------------------


def omniglot(folder: Path) -> Verification:
    """Omniglot: the characters of images_background to train on, pairs from unseen alphabets.

    35 x 35 pixels, the mean of 3 x 3 each; paper is 0. The pairs of the published images_evaluation
    are drawn here, always the same: ten folds of 300 of one character and 300 of two characters of
    one alphabet.

    Raises:
        MissingDataError: the images are not in the folder.
    """
    for place in (folder, folder / "omniglot"):
        background, evaluation = place / "images_background", place / "images_evaluation"
        packed = background.with_suffix(".npz"), place / "omniglot_eval_dev.npz"
        if all(path.is_file() for path in packed):
            with np.load(packed[0]) as train, np.load(packed[1]) as test:
                return _omniglot(train["images"], test["images"], _packed_pairs(test["pairs"]))
        if background.is_dir() and evaluation.is_dir():
            train_images, _ = _read_drawings(background)
            test_images, alphabets = _read_drawings(evaluation)
            return _omniglot(train_images, test_images, draw_pairs(alphabets))
    raise MissingDataError(
        "Omniglot",
        folder,
        [
            "images_background/ and images_evaluation/ with Alphabet/character01/0001_01.png",
            "or images_background.npz and omniglot_eval_dev.npz; there or in omniglot",
        ],
        f"{OMNIGLOT_SOURCE} (images_background.zip and images_evaluation.zip, unpacked)",
    )


def _omniglot(train: np.ndarray, test: np.ndarray, pairs: Pairs) -> Verification:
    """From bool (characters, 20, 105, 105), True where there is paper."""
    images = [_shrink(drawings) for drawings in (train, test)]
    identities = [
        torch.arange(len(drawings)).repeat_interleave(drawings.shape[1])
        for drawings in (train, test)
    ]
    return Verification(images[0], identities[0], images[1], identities[1], pairs)


def _shrink(drawings: np.ndarray) -> Tensor:
    ink = ~drawings.reshape(-1, 35, 3, 35, 3)
    return torch.from_numpy((ink.sum((2, 4)) * (255 / 9)).round().astype(np.uint8)).unsqueeze(1)


def _read_drawings(folder: Path) -> tuple[np.ndarray, list[int]]:
    """All drawings (characters, 20, 105, 105), True where there is paper; each one's alphabet."""
    with needed():
        from PIL import Image
    characters = sorted(path for path in folder.glob("*/*") if path.is_dir())
    alphabets = sorted({path.parent for path in characters})
    drawings = [
        np.stack([np.asarray(Image.open(path)) > 0 for path in sorted(character.glob("*.png"))])
        for character in tqdm(characters, unit="character", desc=folder.name)
    ]
    return np.stack(drawings), [alphabets.index(path.parent) for path in characters]


def _packed_pairs(rows: np.ndarray) -> Pairs:
    """From rows of fold, same, and character and drawing of each side."""
    fold, same, *sides = torch.from_numpy(rows.astype(np.int64)).T
    left, right = (sides[i] * DRAWINGS + sides[i + 1] for i in (0, 2))
    return Pairs(left, right, same.bool(), fold)


def draw_pairs(alphabets: Iterable[int], seed: int = 0) -> Pairs:
    """Ten folds of pairs of drawings of one character, and of two characters of one alphabet.

    No pair is there twice, and no character in two folds: a threshold is tested on characters that
    it was not chosen on.

    Raises:
        ValueError: there are too few characters for it.
    """
    rng = np.random.default_rng(seed)
    alphabet = np.array(list(alphabets))
    dealt = np.argsort(alphabet + rng.random(len(alphabet)))  # each alphabet to all folds
    rows: dict[tuple[int, ...], None] = {}
    for fold in range(FOLDS):
        own = dealt[fold::FOLDS]
        others = {c: own[(alphabet[own] == alphabet[c]) & (own != c)] for c in own}
        accompanied = [c for c in own if len(others[c])]
        if not accompanied:
            raise ValueError(
                f"alphabets: expected so many characters that each of {FOLDS} folds has two of one "
                f"alphabet, got {len(alphabet)}"
            )
        for same in (1, 0):
            end = len(rows) + PAIRS
            while len(rows) < end:
                if same:
                    first = second = rng.choice(own)
                    i, j = rng.choice(DRAWINGS, 2, replace=False)
                else:
                    first = rng.choice(accompanied)
                    second = rng.choice(others[first])
                    i, j = rng.integers(DRAWINGS, size=2)
                left, right = sorted([(first, i), (second, j)])
                rows[(fold, same, *left, *right)] = None
    return _packed_pairs(np.array(list(rows)))
