"""A share of the classes in each training step: the distributed layer in a group of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

import lsoftmax
from options import backend_of


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """The process group that ``sampled`` wants."""
    dist.init_process_group(backend_of(device), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sampled(
    criterion: lsoftmax.LSoftmaxLoss, sample_rate: float, seed: int
) -> lsoftmax.distributed.ClassParallelLSoftmaxLoss:
    """The same loss, class vectors and schedule, of a share of the classes in each step."""
    linear = criterion.linear
    loss = lsoftmax.distributed.ClassParallelLSoftmaxLoss(
        linear.in_features,
        linear.out_features,
        criterion.margin,
        lam=copy.deepcopy(criterion.schedule),  # of its own: a layer moves it on
        weight=criterion.weight,
        sample_rate=sample_rate,
        seed=seed,
        device=linear.weight.device,
    )
    loss.linear.load_state_dict(linear.state_dict())
    return loss
