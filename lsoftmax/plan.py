"""Which way round the N x C logits a call takes: chosen from its shape and the memory there is."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from . import _extension
from .checks import is_recomputed
from .margin import accumulate_type
from .memory import constant_in_graphs, free_memory, is_gpu

# Bytes a logit takes where all N x C are kept: in place of the logits, but for bfloat16, whose
# float32 logits become exponentials in bfloat16.
_BYTES = {torch.float64: 8, torch.float32: 4, torch.float16: 4, torch.bfloat16: 6}

# Where the forward pass is one kernel there are the exponentials alone, and to each row float32
# numbers of the first classes and of each tile of others. Its sizes, and from where on it is taken:
# csrc/hopper.h and fused_forward.cpp.
_FUSED_BYTES = 2
_PILOT_CLASSES = 256
_TILE_ROWS, _TILE_CLASSES, _LEAST_TILES = 128, 256, 128

# So little that nobody asks how much memory there is, which takes a GPU's driver as long as it
# takes to start ten kernels: 64 MB, of a large GPU this share of all it has.
_LITTLE = 1 << 26
_LITTLE_SHARE = 256

# The share of the free memory that the logits may take: the model wants some as well.
_SHARE = 4

# Chunks of rows pay for themselves from this many: each reads and writes all of dW once, in
# float32, beside 6 C D flops a row. On an H200 (790 TFLOP/s, 4.3 TB/s) that traffic is an eighth of
# the products at 2,000 rows; two CPU cores (0.2 TFLOP/s, 10 GB/s) are there at 256. Chunks of
# classes do a third more flops, whatever their size.
_LEAST_ROWS = {"cuda": 2048, "cpu": 256}

# Bytes of the largest array that glibc's malloc keeps for the next one. A larger one a CPU gets
# from the system in each step, which clears every page of it: so chunks of rows pay there, though
# all would fit. They take half as much, to be kept, but no fewer rows than make what they add to
# dW cheaper than the pages; about one a feature is break-even.
_KEPT_BY_MALLOC = 1 << 25
_ROWS_PER_FEATURE = 2

# Classes a chunk has at least, and a multiple of: whole 16-byte packs in every type.
_LEAST_CLASSES = 8

# Bytes of a row's own numbers, beside which a chunk of classes can be small: running sums in double
# from chunk to chunk, and what is left of them for backward.
_ROW_BYTES = 56 + 28


class Plan(NamedTuple):
    """How a loss is computed; both 0: the N x C exponentials are kept for backward ("in budget").

    Attributes:
        class_chunk: classes at a time, exponentials made again in backward: 8 N C D flops.
        row_chunk: rows at a time, gradients formed in forward: 6 N C D flops, and only for a loss
            that is one number.
        bytes: what the N x C arrays, or those of a chunk, take; with the sums of gradients.
    """

    class_chunk: int
    row_chunk: int
    bytes: int


def choose(
    n: int,
    d: int,
    num_classes: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    scalar: bool,
    needs_grad: bool = True,
    memory_budget: int | None = None,
    fusable: bool = False,
) -> Plan:
    """The plan for (N, D) features and (C, D) weights.

    Args:
        n, d, num_classes: N, D, C.
        dtype: of the matrices.
        device: theirs.
        scalar: whether the loss is one number (``reduction`` "mean" or "sum").
        needs_grad: whether there will be a backward pass.
        memory_budget: bytes for what is N x C; None: a quarter of the memory that is free.
        fusable: whether the forward pass may be one kernel, where device, type and sizes allow.
    """
    size = _BYTES[dtype]
    row = num_classes * size
    # Asked of the device last, and only where it matters.
    fusable = fusable and dtype == torch.bfloat16 and d > 0 and d % 8 == 0
    fused = fusable and n * row > _LITTLE and num_classes > _PILOT_CLASSES and fuses_forward(device)
    beside = 4 * (_PILOT_CLASSES + -(-num_classes // _TILE_CLASSES)) if fused else 0
    fused_row = num_classes * _FUSED_BYTES + beside if fused else row
    if memory_budget is None:
        whole = n * fused_row
        little = whole <= _LITTLE or whole <= little_memory(device)
        # What is little is kept whole.
        memory_budget = n * row if little else _share_of_free((n, d, num_classes, dtype), device)

    def within_budget(row_bytes: int, logit_bytes: int) -> Plan:
        """The plan where a row takes so many, and so does a logit in a chunk of classes."""
        chunked, most = n * row_bytes > memory_budget, n
        least = _LEAST_ROWS.get(device.type, n)
        if device.type == "cpu" and n * row_bytes > _KEPT_BY_MALLOC:
            most = max(least, _ROWS_PER_FEATURE * d, _KEPT_BY_MALLOC // 2 // row_bytes)
            chunked = chunked or n >= 2 * most
        if chunked and scalar and needs_grad:
            sums = bytes_beside_rows(n, d, num_classes, dtype)
            rows = min(most, (memory_budget - sums) // row_bytes)
            if rows >= least:
                rows = _even(n, rows, 1)
                return Plan(0, rows, rows * row_bytes + sums)
        if n * row_bytes <= memory_budget:
            return Plan(0, 0, n * row_bytes)
        classes = max(_LEAST_CLASSES, (memory_budget - n * _ROW_BYTES) // (n * logit_bytes))
        classes = _even(num_classes, classes, _LEAST_CLASSES)
        return Plan(classes, 0, n * (classes * logit_bytes + _ROW_BYTES))

    if fused:
        plan = within_budget(fused_row, _FUSED_BYTES)
        rows, classes = plan.row_chunk or n, plan.class_chunk or num_classes
        tiles = -(-rows // _TILE_ROWS) * -(-classes // _TILE_CLASSES)
        # With chunks of classes forward still takes all at once, in the memory of a chunk.
        enough = not plan.class_chunk or classes * _FUSED_BYTES >= beside
        if tiles >= _LEAST_TILES and enough:
            return plan
    return within_budget(row, size)


def bytes_beside_rows(n: int, d: int, num_classes: int, dtype: torch.dtype) -> int:
    """What chunks of rows have beside a chunk: dX and dW in the type of the logits, and where W is
    float16 a copy in that of the exponentials.
    """
    sums = accumulate_type(dtype).itemsize * (n + num_classes) * d
    return sums + (4 * num_classes * d if dtype == torch.float16 else 0)


def _even(total: int, most: int, multiple: int) -> int:
    """The size of chunks of at most about ``most`` that are alike, a multiple of ``multiple``."""
    chunks = -(-total // most)
    size = -(-total // chunks)
    return -(-size // multiple) * multiple


@constant_in_graphs
def fuses_forward(device: torch.device) -> bool:
    """Whether the kernels have the forward pass of bfloat16 in one, and may take it there."""
    if not is_gpu(device) or os.environ.get("LSOFTMAX_FUSED_FORWARD") == "0":
        return False
    kernels = _extension.status()
    return (
        kernels.loaded
        and "9.0a" in kernels.archs
        and torch.cuda.get_device_capability(device) == (9, 0)
    )


@constant_in_graphs
def little_memory(device: torch.device) -> int:
    """Bytes on ``device`` for which to ask what is free is not worth while."""
    if not is_gpu(device):
        return _LITTLE
    total: int = torch.cuda.get_device_properties(device).total_memory
    return max(_LITTLE, total // _LITTLE_SHARE)


_budgets: dict[tuple[object, ...], int] = {}
_MOST_BUDGETS = 256


def _share_of_free(sizes: tuple[object, ...], device: torch.device) -> int:
    """The budget of a call that was given none. Where a checkpoint runs it again, that of the last
    call of these sizes, its first run as a rule: by now less or more is free, and what is saved for
    backward must be the same.
    """
    key = *sizes, device
    if is_recomputed() and key in _budgets:
        return _budgets[key]
    budget = free_memory(device) // _SHARE
    if all(isinstance(size, int) for size in sizes[:3]):  # not while they are traced
        if len(_budgets) >= _MOST_BUDGETS:  # of calls that are never alike
            _budgets.clear()
        _budgets[key] = budget
    return budget
