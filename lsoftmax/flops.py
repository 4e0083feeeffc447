"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of the ops, once this is imported.

Their matrix products alone, as of torch's own layers. Not imported with the package: the counter
imports Triton, where there is one.

Of N x D and C x D matrices each product takes 2 N C D: the logits, and a gradient each in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import ops as ops  # defines what follows
from . import ops_shard as ops_shard


def _register(name: str, products: Callable[[dict[str, Any]], int]) -> None:
    """``products``: how many a call makes, from its arguments by name."""
    op = getattr(torch.ops.lsoftmax, name)
    names = [argument.name for argument in op.default._schema.arguments]

    @register_flop_formula(op)
    def flops(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs  # tensors by their shapes
        n, d = given["input"]
        return 2 * n * given["linear_weight"][0] * d * products(given)


def _gradients(given: dict[str, Any]) -> int:
    return int(given["need_input"]) + int(given["need_weight"])


def _chunked_gradients(given: dict[str, Any]) -> int:
    """In chunks of classes the exponentials are made once more."""
    return _gradients(given) + (given["class_chunk"] > 0)


for _name in ("loss_fwd", "shard_fwd", "linear_fwd"):
    _register(_name, lambda given: 1)
for _name in ("loss_bwd", "shard_bwd"):
    _register(_name, _chunked_gradients)
_register("linear_bwd", _gradients)
_register("loss_and_gradients", lambda given: 1 + _gradients(given))
