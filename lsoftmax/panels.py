"""The N x C work of the fused loss in plain torch: logits to exponentials, a panel at a time.

A panel is some thousand columns of the logits. On a CPU it stays in cache from the matrix product
that makes it through the passes over it, and where the logits are not kept it is all there is of
them. On a GPU each panel is a row of launches: there one panel is everything, unless chunks are
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .margin import Vector, accumulate_type, column_of, namespace, vector

# Logits in a CPU's panel: 2 MB of float32, about a core's cache. Not less: each step of each panel
# is a barrier for torch's threads. And matrix products are slow on few columns.
_PANEL_LOGITS = 1 << 19
_LEAST_CLASSES = 512

# What the width of a panel is a multiple of: whole cache lines. Some % where N is no power of two.
_COLUMNS = 64

# So few logits that numpy, on one core, is done before torch has called its threads.
_FEW_LOGITS = 1 << 14

# How far above its row's reference a logit may be before the reference is raised, which costs a
# pass over what has been written: e^40 is far inside the range of float32.
_HEADROOM = 40.0


def panels(
    x: Tensor, w: Tensor, class_chunk: int, out: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The logits x @ w.T in panels: the classes, their rows of W, and (N, width) logits.

    They are written to ``out`` (N, >= C) where given, else each panel over the one before.
    ``class_chunk`` bounds the width where it is not 0. ``x`` has the type of the logits.
    """
    n, num_classes = x.shape[0], w.shape[0]
    width = min(num_classes, class_chunk or num_classes)
    if x.device.type == "cpu":
        columns = _PANEL_LOGITS // max(1, n) // _COLUMNS * _COLUMNS
        width = min(width, max(_LEAST_CLASSES, columns))
    buffer = x.new_empty(n * width if out is None else 0)
    for start in range(0, num_classes, width):
        classes = slice(start, min(start + width, num_classes))
        columns = classes.stop - start
        z = buffer[: n * columns].view(n, columns) if out is None else out[:, classes]
        panel = w[classes].to(x.dtype)
        yield classes, panel, torch.mm(x, panel.t(), out=z)


class TargetColumn:
    """The targets' entries of one panel: column y_i of row i, where that is in the panel.

    ``num_classes`` is None where targets may be in no panel at all: those of other shards, -1.
    """

    def __init__(self, z: Tensor, classes: slice, index: Tensor, num_classes: int | None) -> None:
        self.z, self.column = z, index.unsqueeze(1)
        self.inside: Tensor | None = None  # None: in every row
        if num_classes is None or z.shape[1] < num_classes:
            self.inside = (self.column >= classes.start) & (self.column < classes.stop)
            self.column = torch.where(self.inside, self.column - classes.start, 0)
        self.before = z.gather(1, self.column)

    def copy_to(self, plain: Tensor) -> None:
        """The entries, to the rows of ``plain`` (N, 1) whose targets are here."""
        here = self.before if self.inside is None else torch.where(self.inside, self.before, plain)
        plain.copy_(here)

    def fill(self, value: float) -> None:
        """Replace them by a number."""
        if self.inside is None:
            self.z.scatter_(1, self.column, value)
        else:
            self.z.scatter_(1, self.column, torch.where(self.inside, value, self.before))

    def add_rows(self, sums: Tensor, x: Tensor, share: Tensor) -> None:
        """sums_y += share_i x_i, ``sums`` having a row for each column of the panel."""
        if self.inside is not None:
            share = torch.where(self.inside.squeeze(1), share, 0.0)
        sums.index_add_(0, self.column.squeeze(1), x * share.unsqueeze(1))


class RowSums:
    """What the forward pass leaves of each row.

    Attributes:
        plain: (N,), x_i . w_y in the type of the logits.
        reference: r, a vector. About the row's largest logit: raised only where a later one is far
            above it. Exact either way, since r cancels.
        others: sum of exp(z_j - r) over j != y, a vector.
        weighted: sum of w_j z_j over j != y with label smoothing, else None.
    """

    def __init__(self, x: Tensor, smooth: bool) -> None:
        self.plain = x.new_zeros(x.shape[0])
        self.others: Vector = vector(x.new_zeros(x.shape[0]))
        self.reference: Vector = self.others - torch.finfo(x.dtype).max
        self.weighted: Vector | None = self.others if smooth else None

    def raise_reference(self, high: Vector, written: Tensor | None) -> None:
        """Rows where ``high`` is far above the reference get it as theirs, also where written."""
        xp = namespace(self.plain)
        raised = xp.where(high > self.reference + _HEADROOM, high, self.reference)
        if xp is np and (raised == self.reference).all():  # on a GPU, looking would stop it
            return
        factor = xp.exp(self.reference - raised)
        self.others = self.others * factor
        self.reference = raised
        if written is not None:
            written.mul_(column_of(factor, written.dtype))


def exponentials(
    x: Tensor,
    w: Tensor,
    index: Tensor,
    e: Tensor | None,
    class_weight: Tensor | None,
    smooth: bool,
    class_chunk: int,
    elsewhere: bool = False,
) -> RowSums:
    """The forward pass. ``e`` (N, C), where given, becomes exp(z - r), 0 in the target's column.

    With ``elsewhere`` a target may be of another shard of the classes, -1.
    """
    num_classes = None if elsewhere else w.shape[0]
    x = x.to(accumulate_type(x.dtype))
    sums = RowSums(x, smooth)
    in_place = e is not None and e.dtype == x.dtype
    for classes, _, z in panels(x, w, class_chunk, e if in_place else None):
        target = TargetColumn(z, classes, index, num_classes)
        target.copy_to(sums.plain.unsqueeze(1))
        if smooth:
            target.fill(0.0)
            weighted = z.sum(1) if class_weight is None else torch.mv(z, class_weight[classes])
            sums.weighted = sums.weighted + vector(weighted)
        target.fill(-math.inf)
        written = e[:, : classes.start] if e is not None and classes.start > 0 else None
        sums.raise_reference(_row_max(z), written)
        exponentiate(z, sums.reference)
        sums.others = sums.others + _row_sums(z)
        if e is not None and not in_place:
            e[:, classes] = z
    return sums


def exponentiate(z: Tensor, reference: Vector, again: bool = False) -> None:
    """z <- exp(z - r), in place.

    ``again``: of logits that are made a second time. Huge ones may round otherwise than when r was
    chosen, by more than the range of an exponential.
    """
    if _is_small(z):
        numbers = z.numpy()
        numbers -= np.asarray(reference)[:, None]
        if again:
            np.minimum(numbers, _HEADROOM, out=numbers)
        np.exp(numbers, out=numbers)
    else:
        z.sub_(column_of(reference, z.dtype))
        if again:
            z.clamp_(max=_HEADROOM)
        z.exp_()


def _row_max(z: Tensor) -> Vector:
    return z.numpy().max(1).astype(np.float64) if _is_small(z) else vector(z.amax(1))


def _row_sums(z: Tensor) -> Vector:
    return z.numpy().sum(1, dtype=np.float64) if _is_small(z) else vector(z.sum(1))


def _is_small(z: Tensor) -> bool:
    return z.device.type == "cpu" and z.numel() <= _FEW_LOGITS
