"""The dispatcher's side of the shard ops: like ``ops``, but without autograd.

Their gradient needs what all shards have in common, so it is ``class_parallel`` that has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import portable, portable_shard
from .margin import accumulate_type
from .ops import library, register_portable

library.define(
    "shard_fwd(Tensor input, Tensor linear_weight, Tensor target, int margin, Tensor lam, "
    "Tensor? smoothing, bool save, int class_chunk) -> (Tensor e, Tensor sums, Tensor cosine)"
)
library.define(
    "shard_bwd(Tensor rows, Tensor input, Tensor linear_weight, Tensor target, Tensor? smoothing, "
    "Tensor e, Tensor reference, int class_chunk, bool need_input, bool need_weight) "
    "-> (Tensor, Tensor)"
)
register_portable("shard_fwd", portable_shard.shard_fwd)
register_portable("shard_bwd", portable_shard.shard_bwd)


@torch.library.register_fake("lsoftmax::shard_fwd", lib=library)
def _shard_fwd_fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    margin: int,
    lam: Tensor,
    smoothing: Tensor | None,
    save: bool,
    class_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = portable.e_storage(input, linear_weight.shape[0], smoothing is not None)
    return (
        input.new_empty(shape if save and class_chunk == 0 else [0], dtype=dtype),
        input.new_empty([7, input.shape[0]], dtype=torch.float64),
        input.new_empty([input.shape[0]], dtype=torch.float32),
    )


@torch.library.register_fake("lsoftmax::shard_bwd", lib=library)
def _shard_bwd_fake(
    rows: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    smoothing: Tensor | None,
    e: Tensor,
    reference: Tensor,
    class_chunk: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_type(input.dtype)
    return (
        input.new_empty(list(input.shape) if need_input else [0], dtype=dtype),
        linear_weight.new_empty(list(linear_weight.shape) if need_weight else [0]),
    )
