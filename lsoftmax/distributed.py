"""L-Softmax over many processes: the classes spread, each process with a batch of its own.

``docs/distributed.md`` has memory and communication per step.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import checks, class_parallel, functional, shard_stats
from .class_parallel import Options, Targets, gather_targets
from .class_shard import ClassShard, device_of, mesh_of
from .clipping import clip_grad_norm_ as clip_grad_norm_
from .diagnostics import MarginStats, wide
from .margin import accumulate_type
from .modules import _Annealed
from .plan import choose
from .rows import low_cosine
from .sampling import ClassSampling, check_sampling
from .schedule import LambdaSchedule

__all__ = ["ClassParallelLSoftmaxLoss", "clip_grad_norm_"]


class ClassParallelLSoftmaxLoss(_Annealed):
    r"""``LSoftmaxLoss`` with the classes spread over the processes of a group.

    Each process holds about C / R rows of W, their gradient and their optimizer state, and calls
    the layer with the features and targets of its own batch, as a data-parallel backbone makes
    them. Every process returns the loss of all batches together; the mean is over all rows. (With
    ``reduction="none"``: the losses of its own rows; the objective is then what all processes make
    of theirs, added up.)

    Gradients are those of one process with all the rows, *once the backbone's have been averaged
    over the processes*, as ``DistributedDataParallel`` and ``fully_shard`` do: the gradient of
    ``input`` is multiplied by R to that end. Pass ``averaged=False`` where they are added up
    instead. The gradient of W is complete as it is: keep the layer out of
    ``DistributedDataParallel``. All processes must call forward and backward the same number of
    times, with the same options, and scale the loss alike.

    ``linear.weight`` is a ``DTensor`` of shape (C, D) in ``Shard(0)``. ``state_dict()`` has the
    keys of :class:`lsoftmax.LSoftmaxLoss`: with ``torch.distributed.checkpoint`` it is saved and
    loaded on any number of processes and by either class. ``load_state_dict`` takes the whole W of
    one process as well.

    With ``sample_rate`` < 1 each training step uses only the classes that are targets of the batch
    and a random share of the others (An et al., ICCVW 2021): the other logits are missing from the
    loss, which makes loss and gradients too small (docs/distributed.md). Rows of W outside the
    sample have the gradient 0. In evaluation mode, or without gradients, all classes count.

    Args:
        in_features: D, the size of a feature.
        num_classes: C, one row of W each.
        margin: integer m >= 1; 1 is plain softmax.
        process_group: a ``ProcessGroup``, a 1-D ``DeviceMesh`` (``mesh["name"]`` of a larger one)
            with the ranks in the order of its group, or None for all processes.
        sample_rate: share of each process's classes in a training step, in (0, 1]. Of
            fewer classes than the global batch has rows all are taken, and of more at least as many
            as it has rows: any of them may be a target. Rows of W outside the sample keep a
            gradient, of 0: it saves products, not memory for gradients.
        seed: of the samples, alike on all processes. What was drawn is counted in ``state_dict()``.
        max_local_batch: the largest batch of any process, where it is known: the processes then
            need not tell each other theirs, every step, before anything else can begin. (They do
            so on the host where the group has a CPU backend, as "cpu:gloo,cuda:nccl" has; a group
            with nothing but NCCL waits for the device.) Every batch is padded to it, and the
            gradient of the features is computed even where no process wants it.
        averaged: see above.
        device: of the module; the group must have a backend for it. None: torch's default, or where
            the ``DeviceMesh`` is.
        lam, dtype, reduction, ignore_index, label_smoothing: as for :class:`lsoftmax.LSoftmaxLoss`.
        weight: (C,) class weights, whole on every process.
        memory_budget: bytes that what is N x C / R may take; where it is not enough the loss is
            computed in chunks of classes.

    Shape:
        - input: (n, D), n >= 0 and different on every process where need be
        - target: (n,), int64 in [0, C) or ``ignore_index``
        - output: scalar, or (n,) for ``reduction="none"``

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
        RuntimeError: ``torch.distributed`` is not initialised, or another process has failed and
            gloo notices (where it is NCCL torch ends this one instead; docs/distributed.md).
        IndexError: a target outside [0, C), on a CPU, on every process; on CUDA the loss is NaN.

    Example:
        With the one process that this is; ``docs/distributed.md`` has one with more.

        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> head = ClassParallelLSoftmaxLoss(512, 1000, margin=4)
        >>> loss = head(torch.randn(32, 512), torch.randint(1000, (32,)))
        >>> loss.backward()
        >>> dist.destroy_process_group()
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: int = 4,
        *,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        sample_rate: float = 1.0,
        seed: int = 0,
        max_local_batch: int | None = None,
        averaged: bool = True,
        lam: LambdaSchedule | float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        in_features = checks.positive("in_features", in_features)
        num_classes = checks.positive("num_classes", num_classes)
        if max_local_batch is not None:
            max_local_batch = checks.positive("max_local_batch", max_local_batch)
        checks.check_dtype(dtype)
        checks.check_loss_options(reduction, label_smoothing)
        budget = checks.check_memory_budget(memory_budget)
        if weight is not None:
            checks.check_class_weight(weight, num_classes)
        check_sampling(sample_rate, seed, label_smoothing)
        where = device_of(process_group, device)
        if where.type == "meta":
            raise ValueError("device: expected one that the group communicates on, got meta")
        mesh = mesh_of(process_group, where)
        self.in_features, self.num_classes = in_features, num_classes
        self.linear = ClassShard(in_features, num_classes, mesh, where, dtype)
        self._init_margin(margin, lam, where, num_classes)
        self.register_buffer("weight", None if weight is None else weight.to(where))
        self.sampling = ClassSampling(sample_rate, seed, where) if sample_rate < 1 else None
        self._sizes_on_host = "cpu" in dist.get_backend_config(self.process_group)
        self.max_local_batch = max_local_batch
        self.averaged = averaged
        self.reduction = reduction
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.label_smoothing = float(label_smoothing)
        self.memory_budget = budget

    @property
    def process_group(self) -> dist.ProcessGroup:
        """Of the processes that share the classes; asked for, not kept: a copy of the layer, which
        an average of its weights is, can't copy it.
        """
        return self.linear.mesh.get_group()

    @torch.compiler.disable
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss; a training forward with gradients enabled advances the schedule by one step."""
        w = self.linear.local()
        x, in_type = functional.autocast(input, w[:0])
        self._check(x, in_type, target)
        checks.check_constant("weight", self.weight)
        size, needs_grad = self._agree(x)
        if needs_grad and not (x.requires_grad or w.requires_grad):
            # Others have a backward pass: so that there is one here too, or they wait for ever.
            x = x.detach().requires_grad_()
        group, classes = self.process_group, self.linear.classes
        targets = gather_targets(target, size, classes, self.num_classes, self.ignore_index, group)
        if self.sampling is not None and self.training and torch.is_grad_enabled():
            w, targets = self._sample(self.sampling, w, targets)
        w = w.to(in_type.dtype)  # autocast's, of no more rows than take part

        dtype = accumulate_type(x.dtype)
        weight = None if self.weight is None else self.weight.to(dtype)
        smoothing = None
        if self.label_smoothing > 0:
            ones = x.new_ones(len(classes), dtype=dtype)
            smoothing = ones if weight is None else weight[classes.start : classes.stop]
        n = size * group.size()
        save = torch.is_grad_enabled() and (needs_grad or w.requires_grad)
        chosen = choose(
            *(n, self.in_features, max(1, w.shape[0]), x.dtype, x.device),
            scalar=False,
            needs_grad=save,
            memory_budget=self.memory_budget,
        )
        lam, trains = self._begin_forward()
        options = Options(
            group=group,
            size=size,
            num_classes=self.num_classes,
            margin=self.margin,
            reduction=checks.REDUCTIONS[self.reduction],
            label_smoothing=float(self.label_smoothing),
            class_chunk=chosen.class_chunk,
            save=save,
            need_input=needs_grad,
            input_factor=float(group.size()) if self.averaged else 1.0,
            measure=trains and self.schedule.keep is not None,
        )
        loss, cosines = class_parallel.loss(x, w, targets, lam, weight, smoothing, options)
        if trains:  # not before the loss was computed: a forward that raised is no training step
            if self.schedule.num_classes is not None:
                cosines = self.schedule.count_classes(cosines.float(), targets.labels)
            elif options.measure:
                cosines = low_cosine(cosines, cosines != math.inf)
            self.schedule.end_step(lam, cosines, self.margin)
            if self.sampling is not None:
                self.sampling.advance()
        if self.reduction == "none":
            start = group.rank() * size
            return loss[start : start + target.shape[0]]
        return loss

    @torch.no_grad()
    def margin_stats(self, input: Tensor, target: Tensor) -> MarginStats:
        """:func:`lsoftmax.margin_stats` of the batches of all processes together, for a log.

        Every process must call it, and gets the same figures; rows of ``ignore_index`` do not
        count. Each process holds the features of all meanwhile, and of its logits a panel.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape, or all batches are empty.
            IndexError: a target outside [0, C), on a CPU, on every process.
        """
        x, w = wide(input), wide(self.linear.local())
        self._check(x, w, target)
        size, _ = self._agree(x)
        own = self.ignore_index, self.margin, self.lam
        return shard_stats.margin_stats(x, w, target, self.linear, size, *own)

    def _check(self, x: Tensor, w: Tensor, target: Tensor) -> None:
        whole = w.new_empty(()).expand(self.num_classes, self.in_features)
        checks.check_matrices(x, whole, target)
        if x.dim() != 2:
            raise ValueError(f"input: expected shape (n, D), got {tuple(x.shape)}")
        if self.max_local_batch is not None and x.shape[0] > self.max_local_batch:
            raise ValueError(
                f"input: expected at most max_local_batch={self.max_local_batch} rows, "
                f"got {x.shape[0]}"
            )

    def _agree(self, x: Tensor) -> tuple[int, bool]:
        """The largest batch, and whether any needs a gradient (one without rows may not say so)."""
        if self.max_local_batch is not None:  # so that all do the same, whatever the others need
            return self.max_local_batch, torch.is_grad_enabled()
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        device = "cpu" if self._sizes_on_host else x.device
        largest = torch.tensor([x.shape[0], needs_grad], device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.process_group)
        size, any_needs_grad = largest.tolist()
        return size, bool(any_needs_grad)

    def _sample(
        self, sampling: ClassSampling, w: Tensor, targets: Targets
    ) -> tuple[Tensor, Targets]:
        """The sampled rows of W, and the targets as rows of these."""
        rank, again = self.process_group.rank(), not self._is_training()
        chosen = sampling(targets.here, w.shape[0], rank, again)
        place = chosen.new_full((w.shape[0] + 1,), -1)  # the last: of what is not here, -1
        place[chosen] = torch.arange(chosen.shape[0], device=chosen.device)
        return w.index_select(0, chosen), targets._replace(here=place[targets.here])

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return (
            f"margin={self.margin}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"processes={self.linear.mesh.size()}"
        )
