"""The loss over classes that are spread over processes: the collectives, and the gradient.

A step, for a global batch of N rows on R processes:

1. all-gather the targets, N, and the features, N D;
2. ``shard_fwd``: the sums of each row over this process's classes, against a reference of its own;
3. all-reduce N references (their maximum) and then a few sums a row, rescaled to it: with them
   every process has the loss of the whole batch, and backward's numbers for its own shard;
4. backward: reduce-scatter dX, N D, begun before the product for dW; dW stays where it is.

Every process's batch is padded with ignored rows to the size of the largest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .autograd import once
from .margin import accumulate_type, namespace, vector
from .panels import RowSums
from .rows import NONE, reduce, row_terms, saved_rows, valid_targets

# Named anew in torch 2.13, which warns of the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_gather(local: Tensor, size: int, fill: float, group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes in the order of their ranks, each padded to ``size`` rows."""
    shape = local.shape[1:]
    if local.shape[0] < size:
        local = torch.cat((local, local.new_full((size - local.shape[0], *shape), fill)))
    gathered = local.new_empty(size * group.size(), *shape)
    _all_gather(gathered, local.contiguous(), group=group)
    return gathered


class Targets(NamedTuple):
    """The targets of the global batch."""

    labels: Tensor  # (N,) in [0, C), 0 where ignored
    kept: Tensor | None  # (N,); None: all
    here: Tensor  # (N,) as rows of this process's W, -1 where they are not in it


def gather_targets(
    target: Tensor,
    size: int,
    classes: range,
    num_classes: int,
    ignore_index: int,
    group: dist.ProcessGroup,
) -> Targets:
    """All-gathers the targets, ``classes`` being the ones that are here.

    Raises:
        IndexError: a target outside [0, C), on every process; on a CPU only.
    """
    gathered = all_gather(target, size, ignore_index, group)
    labels, kept = valid_targets(gathered, num_classes, ignore_index)
    here = (labels >= classes.start) & (labels < classes.stop)
    if kept is not None:
        here &= kept
    # Outside only on a GPU, where nobody looked: the loss will be NaN, no lookup is to assert.
    in_range = labels.clamp(0, num_classes - 1)
    return Targets(in_range, kept, torch.where(here, labels - classes.start, -1))


class Options(NamedTuple):
    """What a call of the loss is, beside its tensors."""

    group: dist.ProcessGroup
    size: int  # rows of each process in the gathered batch
    num_classes: int  # C, on all processes
    margin: int
    reduction: int
    label_smoothing: float
    class_chunk: int
    save: bool  # for backward
    need_input: bool  # whether dX is wanted, by any process
    input_factor: float  # of dX
    measure: bool  # the cosines of the rows


def loss(
    input: Tensor,
    linear_weight: Tensor,
    targets: Targets,
    lam: Tensor,
    weight: Tensor | None,
    smoothing: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The loss of the global batch, on every process, once differentiable in the two matrices.

    Args:
        input: (n, D), the features of this process.
        linear_weight: (C_s, D), the classes of this process, C_s >= 0.
        targets: of the global batch.
        lam: 0-dim float32.
        weight: (C,) class weights, or None.
        smoothing: (C_s,) those of this process with label smoothing (1 without weights), or None.
        options: all else.

    Returns:
        The loss: scalar, or of all N rows without a reduction; a process's gradient may then be 0
        but for its own rows, for they are added up. And, where they are measured, the cosines of
        all N rows to their class vectors, float64, inf of rows that do not count; else of none.
    """
    return _Loss.apply(input, linear_weight, targets, lam, weight, smoothing, options)


class _Loss(torch.autograd.Function):
    """Steps 1 to 3, and 4 as their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        targets: Targets,
        lam: Tensor,
        weight: Tensor | None,
        smoothing: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        labels, kept, here = targets
        dtype = accumulate_type(input.dtype)
        own = input if kept is None else _kept_rows(input, kept, options)
        x = all_gather(own, options.size, 0.0, options.group)
        del own
        e, sums, cosines = _shard_sums(x, linear_weight, here, lam, smoothing, options)
        own_reference = sums[0]
        margins, totals, cosines = _all_reduce(sums, here, cosines, options)
        terms = row_terms(
            margins, totals, labels, options.num_classes, weight, options.label_smoothing
        )
        loss, divisor = reduce(terms.loss, labels, kept, weight, options.reduction, dtype)
        if options.save:
            share = namespace(x).exp(vector(own_reference) - totals.reference)
            terms = terms._replace(scale=terms.scale * share)
            rows = saved_rows(terms, vector(own_reference), kept, dtype)
            rows[1:4].masked_fill_(here < 0, 0.0)
            saved = (x, here, smoothing, e, rows, divisor, kept)
            ctx.save_for_backward(input, linear_weight, *saved)
            ctx.options = options
        ctx.mark_non_differentiable(cosines)
        return loss, cosines

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        input, linear_weight, *saved = ctx.saved_tensors
        sizes_and_needs = input.shape[0], ctx.needs_input_grad[1]
        with torch.no_grad():
            gradients = _backward(ctx.options, *sizes_and_needs, grad, linear_weight, *saved)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = [g if g is None else once(g, input, linear_weight) for g in gradients]
        return *gradients, None, None, None, None, None


def _backward(
    options: Options,
    n: int,
    need_weight: bool,
    grad: Tensor,
    linear_weight: Tensor,
    x: Tensor,
    here: Tensor,
    smoothing: Tensor | None,
    e: Tensor,
    rows: Tensor,
    divisor: Tensor,
    kept: Tensor | None,
) -> list[Tensor | None]:
    """Step 4: the gradients of this process's n features and of its classes."""
    if options.reduction == NONE:
        grad = grad.clone()
        dist.all_reduce(grad, group=options.group)
    g = grad / divisor
    if kept is not None:
        g = torch.where(kept, g, 0.0)  # the mean of no kept rows has an infinite one
    constant = (g * (-options.label_smoothing / options.num_classes)).expand(rows.shape[1])
    scaled = torch.cat((g * rows[:4], constant.unsqueeze(0)))

    def product(need_input: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
        if linear_weight.shape[0] == 0:
            return torch.zeros_like(x, dtype=rows.dtype), torch.zeros_like(linear_weight)
        return torch.ops.lsoftmax.shard_bwd(
            *(scaled, x, linear_weight, here, smoothing, e, rows[4]),
            *(options.class_chunk, need_input, need_weight),
        )

    dx = dw = None
    need_input = options.need_input
    # In chunks, both at once: to make the exponentials twice would take longer than to wait.
    together = options.class_chunk > 0
    if need_input or together:
        parts, dw = product(need_input, need_weight and together)
    if need_input:
        mine = parts.new_empty(options.size, parts.shape[1])
        work: Any = _reduce_scatter(mine, parts, group=options.group, async_op=True)
    if need_weight and not together:
        _, dw = product(False, True)
    if need_input:
        work.wait()
        dx = mine[:n].mul_(options.input_factor).to(x.dtype)
    return [dx, dw if need_weight else None]


def _kept_rows(input: Tensor, kept: Tensor, options: Options) -> Tensor:
    """This process's features, 0 where ignored: they may be NaN there, and 0 * NaN is not 0.

    Before they are gathered, when there is the least of them. It is done in every step on a GPU,
    where nobody looks whether any row is ignored.
    """
    start = options.group.rank() * options.size
    return torch.where(kept[start : start + input.shape[0]].unsqueeze(1), input, 0.0)


def _shard_sums(
    x: Tensor,
    linear_weight: Tensor,
    here: Tensor,
    lam: Tensor,
    smoothing: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """``shard_fwd``, also of a process without classes."""
    if linear_weight.shape[0] > 0:
        return torch.ops.lsoftmax.shard_fwd(
            *(x, linear_weight, here, options.margin, lam, smoothing),
            *(options.save, options.class_chunk),
        )
    sums = x.new_zeros(7, x.shape[0], dtype=torch.float64)
    sums[0] = -torch.finfo(accumulate_type(x.dtype)).max
    return x.new_empty(0), sums, x.new_zeros(x.shape[0], dtype=torch.float32)


def _all_reduce(
    sums: Tensor, here: Tensor, cosines: Tensor, options: Options
) -> tuple[tuple[Any, ...], RowSums, Tensor]:
    """The margin and the sums of each row over all shards; and the cosines, if measured.

    A target that no shard has makes its row's loss NaN: one outside [0, C) where nobody looks, on
    a GPU.
    """
    reference = sums[0].clone()
    dist.all_reduce(reference, dist.ReduceOp.MAX, group=options.group)
    others = sums[1] * torch.exp(sums[0] - reference)
    parts = [others.unsqueeze(0), sums[2:], (here >= 0).unsqueeze(0)]
    if options.measure:
        parts.append(cosines.unsqueeze(0))
    reduced = torch.cat([part.double() for part in parts])
    dist.all_reduce(reduced, group=options.group)
    others, weighted, f, alpha, beta, gamma, claims, *measured = reduced
    f = torch.where(claims == 0, torch.nan, f)  # also where ignored, and nobody looks

    totals = RowSums(reference, options.label_smoothing > 0)
    totals.reference, totals.others = vector(reference), vector(others)
    if totals.weighted is not None:
        totals.weighted = vector(weighted)
    cosines = torch.where(claims > 0, measured[0], torch.inf) if measured else claims[:0]
    return (vector(f), vector(alpha), vector(beta), vector(gamma)), totals, cosines
