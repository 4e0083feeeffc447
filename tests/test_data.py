"""Loaders of examples/: small synthetic files in the published layouts; real ones where named.

LSOFTMAX_DATA names a folder of real data for the tests of it, which else skip.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="the examples need tqdm")

import data
import packs


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31, ())))


@pytest.fixture(scope="module")
def real() -> Path:
    folder = os.environ.get("LSOFTMAX_DATA")
    if folder is None:
        pytest.skip("real data: LSOFTMAX_DATA names no folder")
    return Path(folder)


def byte_array(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """As http://yann.lecun.com/exdb/mnist describes it."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


# ---- MNIST ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(rng, tmp_path, place, zipped):
    """Red if images or labels are swapped, transposed, or taken from the wrong part."""
    arrays = [byte_array(rng, 7, 28, 28), byte_array(rng, 7) % 10]
    arrays += [byte_array(rng, 3, 28, 28), byte_array(rng, 3) % 10]
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, array in zip(data.MNIST_FILES, arrays, strict=True):
        if zipped:
            (tmp_path / place / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (tmp_path / place / name).write_bytes(idx(array))
    mnist = data.mnist(tmp_path)
    assert mnist.classes == 10
    assert np.array_equal(mnist.train_images[:, 0], arrays[0])
    assert np.array_equal(mnist.train_labels, arrays[1])
    assert np.array_equal(mnist.test_images[:, 0], arrays[2])
    assert np.array_equal(mnist.test_labels, arrays[3])
    assert mnist.train_images.dtype == torch.uint8
    assert mnist.train_labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an idx file"),
        (b"<html>404", "expected an idx file.*<htm"),
        (idx(np.zeros((2, 28, 28), np.uint8))[:-1], r"\(2, 28, 28\), got 1583"),
    ],
)
def test_what_is_no_idx_file_is_refused(tmp_path, content, message):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_idx(tmp_path / "images")


# ---- CIFAR ---------------------------------------------------------------------------------------


def cifar_batches(rng: np.random.Generator, classes: int) -> dict[str, tuple]:
    """File name to images (N, 3, 32, 32) and labels, as published: five files and one, or two."""
    train = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    test = "test_batch" if classes == 10 else "test"
    return {
        name: (byte_array(rng, 4, 3, 32, 32), rng.integers(0, classes, 4))
        for name in [*train, test]
    }


def python2(pickled: bytes) -> bytes:
    """The same with the strings of Python 2, by which CIFAR was pickled: neither bytes nor str."""
    codes = {"BINBYTES": b"T", "SHORT_BINBYTES": b"U", "BINUNICODE": b"T"}
    content = bytearray(pickled)
    for opcode, _, position in pickletools.genops(pickled):
        if opcode.name in codes:
            content[position : position + 1] = codes[opcode.name]
    return bytes(content)


def write_pickles(folder: Path, batches: dict[str, tuple], classes: int) -> None:
    folder.mkdir()
    for name, (images, labels) in batches.items():
        batch = {b"data": images.reshape(len(images), -1), b"filenames": [b"a.png"] * len(images)}
        if classes == 10:
            batch[b"labels"] = labels.tolist()
        else:
            batch[b"fine_labels"] = labels.tolist()
            batch[b"coarse_labels"] = (labels // 5).tolist()
        (folder / name).write_bytes(python2(pickle.dumps(batch, protocol=3)))


def write_binaries(folder: Path, batches: dict[str, tuple], classes: int) -> None:
    folder.mkdir()
    for name, (images, labels) in batches.items():
        columns = [labels[:, None]] if classes == 10 else [labels[:, None] // 5, labels[:, None]]
        records = np.hstack([*columns, images.reshape(len(images), -1)]).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(records.tobytes())


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar(rng, tmp_path, classes, version):
    """Red if a batch is left out, coarse labels are taken, or pixels are read in another order."""
    batches = cifar_batches(rng, classes)
    if version == "python":
        folder = "cifar-10-batches-py" if classes == 10 else "cifar-100-python"
        write_pickles(tmp_path / folder, batches, classes)
    else:
        folder = "cifar-10-batches-bin" if classes == 10 else "cifar-100-binary"
        write_binaries(tmp_path / folder, batches, classes)
    for place in (tmp_path, tmp_path / folder):
        cifar = data.cifar(place, classes)
        *train, test = batches.values()
        assert np.array_equal(cifar.train_images, np.concatenate([images for images, _ in train]))
        assert np.array_equal(cifar.train_labels, np.concatenate([labels for _, labels in train]))
        assert np.array_equal(cifar.test_images, test[0])
        assert np.array_equal(cifar.test_labels, test[1])
        assert cifar.classes == classes


def test_a_pickle_calls_nothing(tmp_path):
    """Red if unpickling may run what a file from the network names."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    harmful = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "harmed").encode()
    assert "os system" in "".join(str(arg) for _, arg, _ in pickletools.genops(harmful))
    for name in ("train", "test"):
        (folder / name).write_bytes(harmful)
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system"):
        data.cifar(tmp_path, 100)
    assert not (tmp_path / "harmed").exists()


def test_a_binary_cut_short_is_refused(tmp_path):
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(bytes(3074 * 2 - 1))
    with pytest.raises(ValueError, match=r"records of 3074 bytes, got 6147"):
        data.cifar(tmp_path, 100)


# ---- a long tail ---------------------------------------------------------------------------------


def balanced_images(rng: np.random.Generator, classes: int, of_each: int) -> data.Labelled:
    labels = torch.from_numpy(rng.permutation(np.arange(classes).repeat(of_each)))
    images = torch.from_numpy(byte_array(rng, len(labels), 1, 2, 2))
    return data.Labelled(images, labels, images[:5], labels[:5], classes)


def test_long_tail(rng):
    """The published counts; the first images of each class, in the order they came in."""
    whole = balanced_images(rng, 100, 500)
    tail = whole.long_tailed(100)
    counts = tail.train_labels.bincount().tolist()
    assert (counts[0], counts[-1], sum(counts)) == (500, 5, 10847)
    assert counts == sorted(counts, reverse=True)
    seen = dict.fromkeys(range(100), 0)
    kept = []
    for position, label in enumerate(whole.train_labels.tolist()):
        if seen[label] < counts[label]:
            kept.append(position)
        seen[label] += 1
    assert torch.equal(tail.train_labels, whole.train_labels[kept])
    assert torch.equal(tail.train_images, whole.train_images[kept])
    assert torch.equal(tail.test_images, whole.test_images)
    assert torch.equal(whole.long_tailed(1).train_images, whole.train_images)


def test_a_tail_without_an_image_is_refused(rng):
    whole = balanced_images(rng, 4, 6)
    assert whole.long_tailed(6).train_labels.bincount()[-1] == 1
    with pytest.raises(data.TooFewImagesError, match=r"at most 6, .* got 6\.5"):
        whole.long_tailed(6.5)


# ---- packs ---------------------------------------------------------------------------------------


def residuals_of(planes: np.ndarray) -> np.ndarray:
    """The coder's side of packs, pixel by pixel, in Python's integers."""
    out = np.zeros(planes.shape, np.uint8)
    for (p, n, i, j), value in np.ndenumerate(planes):
        image = planes[p, n].astype(int)
        if i and j:
            w, north, corner = image[i, j - 1], image[i - 1, j], image[i - 1, j - 1]
            if corner >= max(w, north):
                guess = min(w, north)
            elif corner <= min(w, north):
                guess = max(w, north)
            else:
                guess = w + north - corner
        else:
            guess = image[i, j - 1] if j else image[i - 1, j] if i else 0
        out[p, n, i, j] = (int(value) - guess + 128) % 256
    return out


def shard(planes: np.ndarray, second: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, residuals_of(planes))
    np.save(stream, second)
    return lzma.compress(stream.getvalue())


def test_packs_are_decoded_exactly(rng, tmp_path):
    """Red if a prediction, a wrap at 256 or a difference of colours is wrong by one."""
    rgb = byte_array(rng, 3, 2, 6, 5).astype(np.int16)
    coded = np.stack([rgb[1], *(((rgb[c] - rgb[1] + 128) % 256) - 128 for c in (0, 2))])
    labels = np.array([3, 99], np.uint8)
    (tmp_path / "colour.npy2.xz").write_bytes(shard(coded, labels))
    images, read = packs.read_colour_shard(tmp_path / "colour.npy2.xz")
    assert np.array_equal(images, rgb.transpose(1, 0, 2, 3))
    assert np.array_equal(read, labels)

    grey = byte_array(rng, 1, 3, 4, 7)
    (tmp_path / "grey.npy2.xz").write_bytes(shard(grey, np.array(["A_0001", "B_0001", "B_0002"])))
    images, names = packs.read_grey_shard(tmp_path / "grey.npy2.xz")
    assert np.array_equal(images[:, 0], grey[0])
    assert names.tolist() == ["A_0001", "B_0001", "B_0002"]


# ---- missing files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (data.mnist, ["train-images-idx3-ubyte", "t10k-labels", ".gz", "MNIST/raw", "mnist/"]),
        (lambda f: data.cifar(f, 10), ["data_batch_1", "cifar-10-batches-py", ".bin", "kriz"]),
        (lambda f: data.cifar(f, 100), ["train.bin", "cifar-100-python", "kriz"]),
    ],
)
def test_missing_files_are_named(load, words, tmp_path):
    """Red if a user is not told which files are expected, where, and where they are found."""
    (tmp_path / "train").mkdir()  # a folder of that name is no file
    (tmp_path / "test").mkdir()
    with pytest.raises(data.MissingDataError) as caught:
        load(tmp_path)
    for word in [*words, str(tmp_path), "--data"]:
        assert word in str(caught.value)


# ---- the real ones -------------------------------------------------------------------------------


def load_or_skip(load, folder: Path):
    try:
        return load(folder)
    except data.MissingDataError as error:
        pytest.skip(str(error).splitlines()[0])


def test_real_mnist(real):
    mnist = load_or_skip(data.mnist, real)
    assert mnist.train_images.shape == (60000, 1, 28, 28)
    assert mnist.train_labels.bincount().tolist()[:3] == [5923, 6742, 5958]
    assert mnist.test_labels.bincount().tolist()[:3] == [980, 1135, 1032]
    assert mnist.train_images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_real_cifar100(real):
    cifar = load_or_skip(lambda folder: data.cifar(folder, 100), real)
    assert cifar.train_images.shape == (50000, 3, 32, 32)
    assert (cifar.train_labels.bincount() == 500).all()
    means = cifar.train_images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means.tolist(), [0.5071, 0.4865, 0.4409], atol=1e-4, rtol=0)
