"""What the margin does to a batch: angles, buckets, norms, and words where training fails."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, functional
from .margin import accumulate_type
from .panels import TargetColumn, panels
from .reference import psi
from .rows import NO_INDEX, valid_targets

__all__ = ["MarginStats", "collapse_warning", "margin_stats"]

# A class vector shorter than this share of the mean has been lost: its logits say nothing.
_LOST = 0.01
# Where no logit can exceed this, every class is as likely as the next.
_FLAT = 0.1
# From this lam on the loss is plain softmax but for a hundredth.
_NO_MARGIN = 100.0
# Logits of classes that were learned are in the tens. Where the mean norms allow so large ones,
# they are running away.
_RUNAWAY = 1e3
# Logits that are in memory at a time while the largest of each row is looked for.
_PANEL = 1 << 22


class MarginStats(NamedTuple):
    """What :func:`margin_stats` returns: tensors on the device, 0-dim but for ``buckets``.

    Rows without an angle (a zero feature, a zero class vector) count in the norms, in ``accuracy``
    and in ``satisfied`` only.

    Attributes:
        angle: mean angle theta between a feature and the vector of its class, degrees.
        angle_10: the angle that 10% of the rows are below, degrees.
        angle_50: the median.
        angle_90: the angle that 90% are below.
        buckets: (m,) share of the rows with theta in [k pi / m, (k + 1) pi / m], k = 0 .. m - 1.
        accuracy: share of the rows whose class's plain logit is larger than every other: rank 1.
        satisfied: share of the rows whose own margin logit is larger than every other logit.
        input_norm_min: the smallest norm of a feature.
        input_norm: the mean.
        input_norm_max: the largest.
        weight_norm_min: the smallest norm of a class vector, of all classes.
        weight_norm: the mean.
        weight_norm_max: the largest.
        zero_inputs: share of the rows that are exactly zero.
        lost_classes: number of classes whose vector is shorter than 1% of the mean, or zero.
        lam: the annealing weight.
    """

    angle: Tensor
    angle_10: Tensor
    angle_50: Tensor
    angle_90: Tensor
    buckets: Tensor
    accuracy: Tensor
    satisfied: Tensor
    input_norm_min: Tensor
    input_norm: Tensor
    input_norm_max: Tensor
    weight_norm_min: Tensor
    weight_norm: Tensor
    weight_norm_max: Tensor
    zero_inputs: Tensor
    lost_classes: Tensor
    lam: Tensor

    def floats(self) -> dict[str, Any]:
        """Python numbers by name (``buckets``: a list), for a log: waits for the device, once."""
        numbers = torch.cat([value.double().reshape(-1) for value in self]).tolist()
        result: dict[str, Any] = {}
        for name, value in zip(self._fields, self, strict=True):
            taken = [numbers.pop(0) for _ in range(value.numel())]
            result[name] = taken[0] if value.dim() == 0 else taken
        return result


def margin_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int = 4,
    lam: float | Tensor = 0.0,
) -> MarginStats:
    """How far a batch is from what the margin asks, for a log: one forward product, no gradient.

    Nothing waits for the device until the numbers are read. No more than a panel of the N x C
    logits is in memory at a time.

    Args:
        input: (N, D) or (D,): features, N >= 1; 16-bit ones, as autocast makes them, will do.
        linear_weight: (C, D).
        target: (N,) or (), int64 in [0, C): drop rows of an ``ignore_index`` first.
        margin: integer m >= 1.
        lam: the annealing weight, a number >= 0 or a 0-dim tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
        IndexError: a target outside [0, C), on a CPU.

    Example:
        >>> features, labels = torch.randn(32, 512), torch.randint(1000, (32,))
        >>> linear_weight = torch.randn(1000, 512)  # of a layer: head.linear.weight
        >>> stats = margin_stats(features, linear_weight, labels, margin=4, lam=1.0)
        >>> stats.floats()["zero_inputs"]
        0.0
        >>> print(collapse_warning(stats))
        None
    """
    return stats_of(input, linear_weight, target, margin, lam, NO_INDEX)


@torch.no_grad()
def stats_of(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int,
    lam: float | Tensor,
    ignore_index: int,
) -> MarginStats:
    """:func:`margin_stats` without the rows of ``ignore_index``: to leave them out waits for the
    device, unless that is ``NO_INDEX``.
    """
    margin = checks.check_margin(margin)
    x, w = wide(input), wide(linear_weight)
    checks.check_matrices(x, w, target)
    x, y = functional.as_batch(x, target)
    lam = checks.lam_tensor(lam, x)
    y, kept = valid_targets(y, w.shape[0], ignore_index)
    if kept is not None and ignore_index != NO_INDEX:
        x, y = x[kept], y[kept]
    largest = largest_other(x, w, y, w.shape[0])
    return summary(x, w.index_select(0, y), row_norms(w), largest, margin, lam)


def summary(
    x: Tensor, own: Tensor, w_norms: Tensor, largest: Tensor, margin: int, lam: Tensor
) -> MarginStats:
    """The figures, from features (N, D), each one's class vector (N, D), the norms of all class
    vectors (C,), and each feature's largest logit (N,) but for its class's.

    Raises:
        ValueError: there is no feature.
    """
    if x.shape[0] == 0:
        raise ValueError("input: expected at least one row, got none")
    x_norms, own_norms = row_norms(x), row_norms(own)
    theta = _angles(x, own, x_norms, own_norms)
    has_angle = theta.isfinite()

    edges = torch.arange(1, margin, device=x.device, dtype=theta.dtype) * (math.pi / margin)
    bucket = (theta.unsqueeze(1) > edges).sum(1)
    counts = (bucket.unsqueeze(1) == torch.arange(margin, device=x.device)) & has_angle.unsqueeze(1)
    cosine = theta.cos()

    def exceeds(of_angle: Tensor) -> Tensor:
        # Without an angle a row's logit is 0, whatever the margin.
        logit = torch.where(has_angle, x_norms * own_norms * of_angle, 0.0)
        return (logit > largest).double().mean()

    degrees = torch.rad2deg(theta)
    # Made on the device: numbers copied to it would have to be waited for.
    shares = torch.linspace(0.1, 0.9, 3, dtype=degrees.dtype, device=degrees.device)
    quantiles = torch.nanquantile(degrees, shares)
    return MarginStats(
        angle=degrees.nanmean(),
        angle_10=quantiles[0],
        angle_50=quantiles[1],
        angle_90=quantiles[2],
        buckets=counts.sum(0) / has_angle.sum(),
        accuracy=exceeds(cosine),
        satisfied=exceeds((psi(cosine, margin) + lam * cosine) / (1 + lam)),
        input_norm_min=x_norms.min(),
        input_norm=x_norms.mean(),
        input_norm_max=x_norms.max(),
        weight_norm_min=w_norms.min(),
        weight_norm=w_norms.mean(),
        weight_norm_max=w_norms.max(),
        zero_inputs=(x_norms == 0).double().mean(),
        lost_classes=(w_norms <= _LOST * w_norms.mean()).sum(),
        lam=lam.clone(),  # a schedule changes its own in place
    )


def collapse_warning(stats: MarginStats) -> str | None:
    """Words where training is collapsing or diverging, and what to do; None where all is well.

    With the margin at full strength too early the cheapest way to a smaller loss is to shrink
    features or class vectors, to zero in the end: a class is lost, or all of them. With steps too
    long for the margin's slope, and nothing to normalise the features, norms run away instead, to
    infinity in the end. Reads numbers off the device.
    """
    if not isinstance(stats, MarginStats):
        raise TypeError(f"stats: expected MarginStats, got {type(stats).__name__}")
    s = stats.floats()
    logits = s["input_norm"] * s["weight_norm"]
    if not logits <= _RUNAWAY:
        fault = f"norms run away, and allow logits of {logits:.0g}"
        if not all(math.isfinite(s[name]) for name in ("input_norm", "weight_norm")):
            fault = "features or class vectors are not finite"
        return (
            f"Training is diverging: {fault}. Clip the gradients "
            "(torch.nn.utils.clip_grad_norm_(parameters, 5.0)), normalise the features, or lower "
            "the learning rate."
        )
    if s["zero_inputs"] > 0.1:
        fault = f"{s['zero_inputs']:.0%} of the features are exactly zero"
    elif s["lost_classes"] > 0:
        fault = f"{s['lost_classes']:.0f} class vector(s) have shrunk to nothing"
    elif s["input_norm_max"] * s["weight_norm_max"] < _FLAT:
        fault = (
            f"no logit exceeds {s['input_norm_max'] * s['weight_norm_max']:.1g}: features or class "
            "vectors have shrunk, and every class is as likely as the next"
        )
    else:
        return None
    if len(s["buckets"]) == 1 or s["lam"] >= _NO_MARGIN:
        return (
            f"Training is collapsing: {fault}, and not by the margin, which is not there "
            f"(m = {len(s['buckets'])}, lam = {s['lam']:.3g}). Normalise the features, use PReLU, "
            "make them larger, or lower the learning rate."
        )
    return (
        f"Training is collapsing: {fault}. Let the margin set in later or less "
        "(LambdaSchedule.for_steps, a larger minimum), or lower the learning rate."
    )


def wide(tensor: Tensor) -> Tensor:
    """In the type of the logits, where it has one: what is no such tensor is found out later."""
    if isinstance(tensor, Tensor) and tensor.is_floating_point():
        return tensor.to(accumulate_type(tensor.dtype))
    return tensor


def row_norms(rows: Tensor) -> Tensor:
    """(N,) float64, in which the square of no float32 overflows or vanishes."""
    # So few that a copy of them in float64 is no matter.
    few = rows.split(max(1, _PANEL // max(1, rows.shape[1])))
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in few])


def _angles(x: Tensor, w: Tensor, x_norms: Tensor, w_norms: Tensor) -> Tensor:
    """Angle (N,) in radians between rows; NaN where one is zero.

    From the two diagonals of the rhombus of the unit vectors: exact near 0 and pi, where arccos
    has lost half of the digits.
    """
    x, w = x / x_norms.unsqueeze(1), w / w_norms.unsqueeze(1)
    across, along = (torch.linalg.vector_norm(rows, dim=1) for rows in (x - w, x + w))
    return 2 * torch.atan2(across, along)


def largest_other(x: Tensor, w: Tensor, y: Tensor, num_classes: int | None) -> Tensor:
    """The largest logit (N,) of a row but for its target's; -inf where there is no other class.

    ``num_classes`` is None where targets may be in no row of W at all: those of other shards, -1.
    """
    largest = x.new_full(y.shape, -math.inf)
    for classes, _, z in panels(x, w, max(1, _PANEL // max(1, y.shape[0]))):
        TargetColumn(z, classes, y, num_classes).fill(-math.inf)
        largest = torch.maximum(largest, z.amax(1))
    return largest
