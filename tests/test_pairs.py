"""Loaders of LFW and Omniglot: synthetic files in the published layouts; real ones where named.

LSOFTMAX_DATA names a folder of real data for the tests of it, which else skip.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="the examples need tqdm")

import data
import pairs
from test_data import byte_array, load_or_skip, real, rng, shard

__all__ = ["real", "rng"]  # fixtures


# ---- LFW -----------------------------------------------------------------------------------------

PAIRS = "2\t1\nAda_B\t1\t2\nAda_B\t2\tCy\t1\nDot\t1\t3\nCy\t1\tDot\t2\n"
FACES = ["Ada_B_0001", "Ada_B_0002", "Cy_0001", "Dot_0001", "Dot_0002", "Dot_0003"]


def check_lfw(faces: pairs.Verification) -> None:
    assert faces.identities.tolist() == [0, 0, 1, 2, 2, 2]
    rows = zip(*(t.tolist() for t in vars(faces.pairs).values()), strict=True)
    assert list(rows) == [(0, 1, True, 0), (1, 2, False, 0), (3, 5, True, 1), (2, 4, False, 1)]


def test_lfw_as_published(rng, tmp_path):
    """Red if a pair's line is read wrongly, or the face is cut from the wrong place."""
    image = pytest.importorskip("PIL.Image", reason="LFW's pictures need pillow")
    pictures = {}
    for face in FACES:
        folder = tmp_path / "lfw-deepfunneled" / face[:-5]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((250, 250), np.uint8)
        pixels[61:189, 61:189] = np.repeat(np.repeat(byte_array(rng, 8, 8), 16, 0), 16, 1)
        pictures[face] = pixels[61:189:2, 61:189:2]
        picture = image.fromarray(np.repeat(pixels[..., None], 3, 2))
        picture.save(folder / f"{face}.jpg", quality=95)
    (tmp_path / "pairs.txt").write_text(PAIRS)
    faces = pairs.lfw(tmp_path)
    check_lfw(faces)
    assert faces.images.shape == (6, 1, 64, 64)
    for face, read in zip(FACES, faces.images[:, 0].int(), strict=True):
        assert (read - torch.from_numpy(pictures[face]).int()).abs().float().mean() < 3


def test_lfw_packed(rng, tmp_path):
    grey = byte_array(rng, 1, 6, 4, 4)
    (tmp_path / "lfw").mkdir()
    (tmp_path / "lfw" / pairs.LFW_PACK).write_bytes(shard(grey, np.array(FACES)))
    (tmp_path / "lfw" / "pairs.txt").write_text(PAIRS)
    faces = pairs.lfw(tmp_path)
    check_lfw(faces)
    assert np.array_equal(faces.images[:, 0], grey[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAIRS + "Cy\t1\t2\n", "expected 4 pairs, got 5"),
        (PAIRS.replace("Dot\t1\t3", "Dot\t1\t4"), r"Dot_0004.*is not there"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    index_of = {name: index for index, name in enumerate(FACES)}
    with pytest.raises(ValueError, match=message):
        pairs.read_pairs(tmp_path / "pairs.txt", index_of)


# ---- Omniglot ------------------------------------------------------------------------------------


def drawings(rng: np.random.Generator, characters: int) -> np.ndarray:
    """True where there is paper, in blocks of 3 x 3, so that shrinking loses nothing."""
    coarse = rng.random((characters, 20, 35, 35)) < 0.8
    return coarse.repeat(3, 2).repeat(3, 3)


def test_omniglot_packed(rng, tmp_path):
    train, test = drawings(rng, 3), drawings(rng, 4)
    np.savez(tmp_path / "images_background.npz", images=train)
    rows = np.array([(0, 1, 2, 5, 2, 19), (1, 0, 3, 0, 1, 7)], np.int16)
    np.savez(tmp_path / "omniglot_eval_dev.npz", images=test, pairs=rows)
    omniglot = pairs.omniglot(tmp_path)
    expected = np.where(train[:, :, ::3, ::3], 0, 255).reshape(60, 1, 35, 35)
    assert np.array_equal(omniglot.images, expected)
    assert omniglot.identities.tolist() == [i for i in range(3) for _ in range(20)]
    assert omniglot.pairs.left.tolist() == [45, 60]
    assert omniglot.pairs.right.tolist() == [59, 27]
    assert omniglot.pairs.same.tolist() == [True, False]
    assert omniglot.pairs.fold.tolist() == [0, 1]


def test_omniglot_as_published(rng, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Omniglot's pictures need pillow")
    train = drawings(rng, 2)
    for part, latin in (("images_background", 2), ("images_evaluation", 20)):
        for alphabet, character in (("Greek", 0), *(("Latin", i) for i in range(latin))):
            folder = tmp_path / part / alphabet / f"character{character + 1:02}"
            folder.mkdir(parents=True)
            for drawing in range(20):
                paper = train[character % 2, drawing]
                image.fromarray(paper).save(folder / f"0001_{drawing + 1:02}.png")
    omniglot = pairs.omniglot(tmp_path)
    shrunk = np.where(train[:, :, ::3, ::3], 0, 255)
    order = [0, 0, 1]  # Greek 1, Latin 1, Latin 2
    assert np.array_equal(omniglot.images, shrunk[order].reshape(60, 1, 35, 35))
    assert omniglot.test_identities.tolist() == [i for i in range(21) for _ in range(20)]


def test_drawn_pairs_are_balanced_and_of_one_alphabet(rng):
    """Red if a pair of two alphabets, of an image and itself, or of two folds' characters, is among
    them, or one is there twice.
    """
    alphabets = rng.permutation(np.repeat([0, 1, 2], [20, 37, 1]))
    drawn = pairs.draw_pairs(alphabets)
    left, right = drawn.left // 20, drawn.right // 20
    assert torch.equal(drawn.fold.bincount(), torch.full((10,), 600))
    assert torch.equal(drawn.fold[drawn.same].bincount(), torch.full((10,), 300))
    assert torch.equal(left == right, drawn.same)
    assert (drawn.left != drawn.right).all()
    assert np.array_equal(alphabets[left], alphabets[right])
    assert set(left[drawn.same].tolist()) == set(range(58))
    of_fold = torch.stack([torch.cat([left, right]), drawn.fold.repeat(2)], 1)
    assert len(of_fold.unique(dim=0)) == 58, "a character is in two folds"
    both = torch.stack([drawn.left, drawn.right], 1).sort(1).values
    assert len(both.unique(dim=0)) == 6000
    assert torch.equal(drawn.left, pairs.draw_pairs(alphabets).left), "always the same"
    with pytest.raises(ValueError, match="two of one alphabet, got 11"):
        pairs.draw_pairs([7] * 11)


# ---- missing files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (pairs.lfw, ["pairs.txt", "Person_Name_0001.jpg", "lfw-deepfunneled", "vis-www"]),
        (pairs.omniglot, ["images_background", "images_evaluation", "brendenlake"]),
    ],
)
def test_missing_files_are_named(load, words, tmp_path):
    """Red if a user is not told which files are expected, where, and where they are found."""
    with pytest.raises(data.MissingDataError) as caught:
        load(tmp_path)
    for word in [*words, str(tmp_path), "--data"]:
        assert word in str(caught.value)


# ---- the real ones -------------------------------------------------------------------------------


def test_real_lfw(real):
    faces = load_or_skip(pairs.lfw, real)
    assert len(faces.images) == 13233
    assert faces.identities.max() + 1 == 5749
    left, right = (faces.identities[i] for i in (faces.pairs.left, faces.pairs.right))
    assert torch.equal(left == right, faces.pairs.same)
    assert torch.equal(faces.pairs.fold[faces.pairs.same].bincount(), torch.full((10,), 300))


def test_real_omniglot(real):
    omniglot = load_or_skip(pairs.omniglot, real)
    assert omniglot.images.shape == (964 * 20, 1, 35, 35)
    left, right = (omniglot.test_identities[i] for i in (omniglot.pairs.left, omniglot.pairs.right))
    assert torch.equal(left == right, omniglot.pairs.same)
    assert 0.02 < omniglot.images.float().mean() / 255 < 0.15, "ink is the smaller part"
