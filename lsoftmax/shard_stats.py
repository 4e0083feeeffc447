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
    x: Tensor, shard: ClassShard, target: Tensor, ignore_index: int, margin: int, lam: Tensor
) -> MarginStats:
    """Of the global batch, on every process. All processes must call it.

    Args:
        x: (n, D), the features of this process, in the type of the logits.
        shard: its class vectors.
        target: (n,), int64 in [0, C) or ``ignore_index``.
        ignore_index: rows that do not count.
        margin, lam: of the layer.
    """
    group, w = shard.mesh.get_group(), shard.local().to(x.dtype)
    size = torch.tensor(x.shape[0], device=x.device)
    dist.all_reduce(size, dist.ReduceOp.MAX, group=group)
    rows, num_classes = int(size), shard.num_classes
    _, kept, here = gather_targets(target, rows, shard.classes, num_classes, ignore_index, group)
    x = all_gather(x, rows, 0.0, group)
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
