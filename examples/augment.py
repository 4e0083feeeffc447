"""Random changes to a batch of images, drawn on the CPU so that every device sees the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def move(images: Tensor, generator: torch.Generator, *, pixels: int = 4, flip: bool) -> Tensor:
    """Each image moved by up to ``pixels`` each way, what is missing 0; with ``flip``, half of them
    mirrored.

    Args:
        images: (N, channels, height, width).
        generator: on the CPU.
        pixels: in [0, height) and [0, width).
        flip: whether left and right may change places.
    """
    n, _, height, width = images.shape
    device = images.device
    shift = torch.randint(0, 2 * pixels + 1, (2, n, 1), generator=generator).to(device)
    rows = shift[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    if flip:
        mirrored = (torch.rand(n, 1, generator=generator) < 0.5).to(device)
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = shift[1] + columns
    padded = F.pad(images, (pixels, pixels, pixels, pixels)).movedim(1, -1)
    index = torch.arange(n, device=device).view(n, 1, 1)
    return padded[index, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(-1, 1)
