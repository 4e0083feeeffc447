"""Clipping of gradients by their norm, of a model whose parameters are partly sharded."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for a model whose parameters are partly sharded.

    The norm is that of all gradients, shards on other processes included; plain parameters count
    once, for data-parallel processes have the same gradients. Every process must call it.

    Args:
        parameters: plain ones, and ``DTensor`` ones of any device mesh (a
            ``ClassParallelLSoftmaxLoss``, a backbone under ``fully_shard``), or one. Those
            without a gradient are passed over.
        max_norm: gradients are scaled to a norm no larger than this.
        norm_type: of the p-norm; inf is the maximum.

    Returns:
        The norm before clipping, 0-dim, the same on every process.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    of_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            of_mesh.setdefault(mesh, []).append(parameter)
    norms = [
        _norm([p.grad for p in alike if p.grad is not None], mesh, norm_type)
        for mesh, alike in of_mesh.items()
    ]
    total = get_total_norm(norms, norm_type)
    for alike in of_mesh.values():  # plain ones and DTensors do not mix in one operation
        clip_grads_with_norm_(alike, max_norm, total)
    return total


def _norm(gradients: list[Tensor], mesh: DeviceMesh | None, norm_type: float) -> Tensor:
    """Of all of them, with all their shards: the same on every process of the mesh."""
    if float(norm_type) != math.inf:
        norm = get_total_norm(gradients, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    # By hand, for torch refuses the largest of nothing, which a process without rows has.
    parts = []
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            whole = [Replicate() if p.is_partial() else p for p in gradient.placements]
            gradient = gradient.redistribute(placements=whole).to_local()
        parts.append(gradient if gradient.numel() > 0 else gradient.new_zeros(1))
    norm = get_total_norm(parts, norm_type)
    for group in [] if mesh is None else mesh.get_all_groups():
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
    return norm
