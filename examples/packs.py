"""Images packed without loss in ``.npy2.xz`` shards: an xz stream of two .npy arrays.

The first holds what is left of each pixel, uint8 (planes, N, height, width), once it has been
predicted from its neighbours to the west, north and north-west (the median edge predictor of
JPEG-LS), plus 128; the second a label or a name for each image. Colour is coded as G, R - G, B - G.
"""

from __future__ import annotations

import io
import lzma
from pathlib import Path

import numpy as np


def read_colour_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """RGB images uint8 (N, 3, height, width) and their labels (N,)."""
    (green, red, blue), labels = _read(path)
    return np.stack([red + green, green, blue + green], axis=1).astype(np.uint8), labels


def read_grey_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grey images uint8 (N, 1, height, width) and their names (N,)."""
    planes, names = _read(path)
    return planes[0][:, None].astype(np.uint8), names


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    stream = io.BytesIO(lzma.decompress(path.read_bytes()))
    return _unpredict(np.load(stream)), np.load(stream)


def _unpredict(residuals: np.ndarray) -> np.ndarray:
    """Pixels int16 (planes, N, height, width): differences of colours are in [-128, 127]."""
    # Pixel by pixel, for all images at once; these lie next to each other while that is done.
    rest = np.ascontiguousarray(residuals.transpose(2, 3, 0, 1)).astype(np.int16) - 128
    height, width = rest.shape[:2]
    pixels = np.empty_like(rest)
    for i in range(height):
        for j in range(width):
            if i and j:
                west, north, corner = pixels[i, j - 1], pixels[i - 1, j], pixels[i - 1, j - 1]
                low, high = np.minimum(west, north), np.maximum(west, north)
                guess = np.clip(west + north - corner, low, high)
            else:
                guess = pixels[i, j - 1] if j else pixels[i - 1, j] if i else np.int16(0)
            value = rest[i, j] + guess
            pixels[i, j, 0] = value[0] & 255
            pixels[i, j, 1:] = ((value[1:] + 128) & 255) - 128
    return pixels.transpose(2, 3, 0, 1)
