"""Pictures of what the loss does, computed by the functions that train: python -m lsoftmax plot.

Every function returns a figure. They need matplotlib, which the extra ``plot`` installs.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Wedge
from torch import Tensor
from torch.nn import functional as F

from .functional import lsoftmax_linear, lsoftmax_loss, psi

__all__ = ["Features", "draw_boundary", "draw_features", "draw_loss", "draw_psi", "save"]

COLOURS = {1: "0.35", 2: "C0", 3: "C1", 4: "C3"}
DIGITS = [f"C{digit}" for digit in range(10)]  # matplotlib's default colours, tab10
REGIONS = {0: "#8fb8de", 1: "#f2b880", -1: "#f4f4f4"}  # of the first class, the second, neither


def name_of(margin: int) -> str:
    """What a margin is called."""
    return "softmax" if margin == 1 else f"L-Softmax, m = {margin}"


def format_of(path: Path | str) -> str:
    """What a picture of this name is saved as: "png", "pdf" or "svg".

    Raises:
        ValueError: the name ends otherwise.
    """
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in ("png", "pdf", "svg"):
        raise ValueError(f"{path}: expected a name that ends in .png, .pdf or .svg")
    return ending


def save(figure: Figure, path: Path | str) -> None:
    """Write a picture, whole or not at all.

    Args:
        figure: of matplotlib.
        path: the file, which is replaced where it exists.

    Raises:
        OSError: it cannot be written.
        ValueError: its name has no ending of a picture, see ``format_of``.
    """
    buffer, path = io.BytesIO(), Path(path)
    figure.savefig(buffer, format=format_of(path), bbox_inches="tight")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    figure = Figure((columns * size[0], rows * size[1]), dpi=130, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_psi() -> Figure:
    """psi over the angle, as figure 2 of the paper, and its slope; m = 1 is the cosine."""
    figure, (curves, slopes) = _panels(1, 2, (4.4, 3.5))
    theta = torch.linspace(0, math.pi, 721, dtype=torch.float64, requires_grad=True)
    degrees = torch.rad2deg(theta).tolist()
    for margin, colour in COLOURS.items():
        values = psi(theta.cos(), margin)
        (slope,) = torch.autograd.grad(values.sum(), theta)
        label = "m = 1: cos θ" if margin == 1 else f"m = {margin}"
        curves.plot(degrees, values.tolist(), color=colour, label=label)
        slopes.plot(degrees, (-slope).tolist(), color=colour)
    curves.set(title="ψ(θ), in place of cos θ")
    curves.legend(frameon=False)
    slopes.set(title="−dψ/dθ, the pull towards the class")
    for axes in (curves, slopes):
        axes.set(xlabel="angle θ to the own class, degrees", xticks=range(0, 181, 30))
        axes.set(xlim=(0, 180))
        axes.grid(color="0.93")
    return figure


def draw_loss(norms: float = 8.0) -> Figure:
    """The loss of a feature turning from its class past another, at 90 degrees, and on.

    Args:
        norms: of the feature times that of the class vector.
    """
    figure, (by_margin, by_lam) = _panels(1, 2, (4.4, 3.5))
    theta = torch.linspace(0, math.pi, 721, dtype=torch.float64)
    x = norms * torch.stack((theta.cos(), theta.sin()), 1)
    own = torch.zeros(len(theta), dtype=torch.int64)

    def plot(axes: Any, margin: int, lam: float, **style: Any) -> None:
        loss = lsoftmax_loss(x, torch.eye(2).double(), own, margin, lam, reduction="none")
        axes.plot(torch.rad2deg(theta).tolist(), loss.tolist(), **style)

    for margin, colour in COLOURS.items():
        label = "softmax" if margin == 1 else f"m = {margin}"
        plot(by_margin, margin, 0.0, color=colour, label=label)
    by_margin.set_title("λ = 0")
    shades = {1000.0: "0.35", 10.0: "#f6c9a8", 5.0: "#ee9f78", 1.0: "#dd6f54", 0.3: "#c23d3a"}
    for lam, colour in {**shades, 0.0: "#7d1025"}.items():
        plot(by_lam, 4, lam, color=colour, label=f"λ = {lam:g}")
    by_lam.set_title("m = 4: from softmax to the whole margin")
    for axes in (by_margin, by_lam):
        axes.axvline(90, color="0.6", lw=0.8, ls=":")
        axes.set(xlabel="angle θ to the own class, degrees", xticks=range(0, 181, 30))
        axes.set(xlim=(0, 180), ylim=(0, 7.5 * norms))
        axes.legend(frameon=False)
        axes.grid(color="0.93")
    by_margin.set_ylabel(f"loss, |x||w| = {norms:g}")
    by_margin.text(92, 7.4 * norms, "other class", va="top", fontsize=8, color="0.4")
    return figure


def regions(weight: Tensor, points: Tensor, margin: int) -> Tensor:
    """Where each class is decided with its margin: 0 or 1; -1 where neither is.

    Args:
        weight: (2, D), the two class vectors.
        points: (P, D).
        margin: m.

    Returns:
        (P,) int64: 0 where f_0 > z_1, the margin logit of class 0 above the plain one of class 1;
        1 where f_1 > z_0.
    """
    decided = torch.full((len(points),), -1)
    for own in (0, 1):
        target = torch.full((len(points),), own)
        logits = lsoftmax_linear(points, weight, target, margin)
        decided[logits[:, own] > logits[:, 1 - own]] = own
    return decided


def draw_boundary(margins: Sequence[int] = (1, 2, 4)) -> Figure:
    """The decision regions of two classes whose vectors are 90 degrees apart, of three lengths.

    Both classes' regions as training sees them, each from its own margin logit; between them lies
    the margin, where neither is satisfied. Dashed: where plain logits decide, as inference does.

    Args:
        margins: integers m >= 1, a row of pictures each.
    """
    lengths = {"|W₁| = |W₂|": (1.0, 1.0), "|W₁| > |W₂|": (1.25, 0.75), "|W₁| < |W₂|": (0.75, 1.25)}
    figure, panels = _panels(len(margins), len(lengths), (2.9, 2.9))
    degrees = torch.linspace(0, 360, 7201, dtype=torch.float64)
    turn = torch.deg2rad(degrees)
    ring = torch.stack((turn.cos(), turn.sin()), 1)  # logits grow with |x|: directions suffice
    directions = ring[[2700, 900]]  # 135 and 45 degrees
    cells = [(margin, *item) for margin in margins for item in lengths.items()]
    for axes, (margin, title, pair) in zip(panels, cells, strict=True):
        weight = directions * torch.tensor(pair, dtype=torch.float64).unsqueeze(1)
        decided, counts = torch.unique_consecutive(
            regions(weight, ring, margin), return_counts=True
        )
        ends = counts.cumsum(0)
        for region, start, end in zip(decided, ends - counts, ends - 1, strict=True):
            cone = degrees[start].item(), degrees[end].item()
            axes.add_patch(Wedge((0, 0), 3, *cone, color=REGIONS[int(region)], lw=0.5))
        x, y = (weight[0] - weight[1]).tolist()
        axes.axline((0, 0), (-y, x), color="0.3", ls="--", lw=1)
        for number, (x, y) in enumerate(weight.tolist(), 1):
            axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "k"})
            label = axes.text(1.15 * x, 1.15 * y, f"W{number}")
            label.set(ha="center", va="center", weight="bold", fontsize=9)
        if margin == margins[0]:
            axes.set_title(title)
        axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[], aspect="equal")
    for axes, margin in zip(panels[:: len(lengths)], margins, strict=True):
        axes.set_ylabel(name_of(margin))
    return figure


class Features(NamedTuple):
    """What a picture of features shows.

    Attributes:
        features: (N, 2).
        class_vectors: (10, 2).
        title: above the picture.
    """

    features: Tensor
    class_vectors: Tensor
    title: str


def draw_features(panels: Sequence[Features], labels: Iterable[int]) -> Figure:
    """Features in the plane, a colour a class, class vectors as rays with the class at the end.

    Args:
        panels: a picture each, all of the same N rows.
        labels: N classes in 0 .. 9.
    """
    figure, all_axes = _panels(1, len(panels), (3.6, 4.3))
    colours = [DIGITS[label] for label in labels]
    for axes, (features, class_vectors, title) in zip(all_axes, panels, strict=True):
        radius = 1.05 * features.norm(dim=1).max().item()
        for digit, (x, y) in enumerate(F.normalize(class_vectors).tolist()):
            axes.plot([0, radius * x], [0, radius * y], color=DIGITS[digit], lw=1, alpha=0.6)
            label = axes.text(1.1 * radius * x, 1.1 * radius * y, str(digit), color=DIGITS[digit])
            label.set(ha="center", va="center", weight="bold")
        axes.scatter(*features.T.tolist(), c=colours, s=7, linewidths=0, zorder=2)
        axes.set_title(title, fontsize=10.5)
        limit = 1.2 * radius  # room for the digits
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_color("0.8")
    return figure
