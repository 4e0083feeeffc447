"""What torch's counter says of the ops, against what it counts in torch's own layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import lsoftmax.flops  # noqa: F401  (what is tested: it registers)
from chunks import run
from lsoftmax import functional
from problems import problem
from test_distributed_ops import SIZES, added_up

N, D, C = 13, 7, sum(SIZES)


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("frozen", ["none", "x", "w"])
@pytest.mark.parametrize("name", ["lsoftmax_loss", "lsoftmax_linear"])
def test_as_many_as_torchs_linear_layer(name: str, frozen: str, device: str) -> None:
    p = problem(N, D, C, torch.float32, device)
    if frozen != "none":
        getattr(p, frozen).requires_grad_(False)
    theirs = counted(lambda: F.cross_entropy(F.linear(p.x, p.w), p.y).backward())
    assert theirs == (6 if frozen == "none" else 4) * N * D * C
    ours = getattr(functional, name)
    assert counted(lambda: ours(p.x, p.w, p.y).sum().backward()) == theirs


@pytest.mark.parametrize(("way", "products"), [(("classes", 8), 4), (("rows", 5), 3)])
def test_chunks(way: tuple[str, int], products: int, device: str) -> None:
    """Chunks of classes make their exponentials twice."""
    p = problem(N, D, C, torch.float32, device)
    assert counted(lambda: run(p, way)) == 2 * products * N * D * C


@pytest.mark.parametrize(("class_chunk", "products"), [(0, 1 + 2 + 1 + 1), (8, 1 + 3 + 2 + 2)])
def test_shards(class_chunk: int, products: int, device: str) -> None:
    """The logits; then both gradients, dX alone and dW alone."""
    p = problem(N, D, C, torch.float32, device)
    assert counted(lambda: added_up(p, SIZES, class_chunk)) == 2 * products * N * D * C
