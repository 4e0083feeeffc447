"""margin_stats of a batch and of classes that are spread over processes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .class_parallel import all_gather, gather_targets
from .class_shard import ClassShard
from .diagnostics import MarginStats, largest_other, row_norms, summary


def margin_stats(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    shard: ClassShard,
    size: int,
    ignore_index: int,
    margin: int,
    lam: Tensor,
) -> MarginStats:
    """Of the global batch, on every process. All processes must call it.

    Args:
        x: (n, D), the features of this process, in the type of the logits.
        w: (C_s, D), its class vectors, in the same type.
        target: (n,), int64 in [0, C) or ``ignore_index``.
        shard: the classes, and the processes that share them.
        size: of the largest batch.
        ignore_index: rows that do not count.
        margin, lam: of the layer.

    Raises:
        RuntimeError: the class vectors at hand are not those of ``shard``.
    """
    if w.shape[0] != len(shard.classes):
        raise RuntimeError(
            f"linear.weight: expected {len(shard.classes)} rows, got {w.shape[0]}: something else, "
            "such as fully_shard, has sharded them; keep the layer out of it"
        )
    group, num_classes = shard.mesh.get_group(), shard.num_classes
    _, kept, here = gather_targets(target, size, shard.classes, num_classes, ignore_index, group)
    x = all_gather(x, size, 0.0, group)
    if kept is not None:
        x, here = x[kept], here[kept]

    own, inside = torch.zeros_like(x), here >= 0
    own[inside] = w[here[inside]]
    dist.all_reduce(own, group=group)
    largest = x.new_full(here.shape, -math.inf)
    if len(shard.classes) > 0:
        largest = largest_other(x, w, here, None)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    # Only the last shards are shorter than the first.
    w_norms = all_gather(row_norms(w), -(-num_classes // group.size()), 0.0, group)[:num_classes]
    return summary(x, own, w_norms, largest, margin, lam)
