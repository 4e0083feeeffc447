"""The shard ops on their own, added up by hand: three shards of the classes in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lsoftmax.sampling import ClassSampling
from problems import problem, relative_error

SHARDS = (slice(0, 13), slice(13, 14), slice(14, 30))
MARGIN = 3


def local(y: Tensor, shard: slice) -> Tensor:
    return torch.where((y >= shard.start) & (y < shard.stop), y - shard.start, -1)


@pytest.mark.parametrize("norm", [4.0, 60.0])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("class_chunk", [0, 5])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
    ids=str,
)
def test_shards_add_up(
    dtype: torch.dtype, bound: float, class_chunk: int, smoothed: bool, norm: float, device: str
) -> None:
    """To the float64 truth. What is done with the sums here follows from the definitions in
    docs/design.md, not from the code that does it in the package.
    """
    n, c, smoothing = 24, 30, 0.1 if smoothed else 0.0
    p = problem(n, 12, c, dtype, device, norm)
    weight = (torch.rand(c) + 0.5).to(device).double()
    options = {"margin": MARGIN, "lam": 0.5, "label_smoothing": smoothing, "weight": weight}
    true_loss, true_dx, true_dw = p.true_loss(reduction="sum", **options)  # times 0.5, upstream
    x, w = p.x.detach(), p.w.detach()
    lam = torch.tensor(0.5, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    part = [weight[shard].to(wide) if smoothed else None for shard in SHARDS]

    forward = [
        torch.ops.lsoftmax.shard_fwd(
            x, w[shard].contiguous(), local(p.y, shard), MARGIN, lam, of_shard, True, class_chunk
        )
        for shard, of_shard in zip(SHARDS, part, strict=True)
    ]
    sums = torch.stack([s for _, s in forward])  # (shards, 7, N)
    lse = torch.logsumexp(sums[:, 0] + sums[:, 1].log(), 0)  # L
    weighted, f, alpha, beta, gamma = sums[:, 2:].sum(0)
    own = weight[p.y]
    total = (1 - smoothing) * own + smoothing / c * weight.sum()  # A
    both = torch.logaddexp(lse, f)
    q_y = (1 - smoothing) * own + smoothing / c * own
    loss = total * both - q_y * f - smoothing / c * weighted
    if not smoothed:
        loss = own * F.softplus(lse - f)
        total = own
    assert relative_error(loss.sum(), true_loss) <= max(1e-12, 1e-6 * (wide == torch.float32))

    t = -torch.sigmoid(lse - f)
    target_gradient = total * t + (total - q_y)  # A p_y - q_y
    dx, dw = 0, []
    for shard, of_shard, (e, s) in zip(SHARDS, part, forward, strict=True):
        here = local(p.y, shard) >= 0
        shares = torch.stack(
            (
                target_gradient * beta,
                target_gradient * gamma,
                target_gradient * alpha + smoothing / c * own,  # the constant is in its column too
            )
        )
        scale = total * torch.exp(s[0] - both)
        constant = torch.full_like(scale, -smoothing / c)
        rows = torch.cat((scale[None], torch.where(here, shares, 0), constant[None]))
        rows = (0.5 * rows).to(wide)
        saved = (x, w[shard].contiguous(), local(p.y, shard), of_shard, e, s[0].to(wide))
        both_at_once = torch.ops.lsoftmax.shard_bwd(rows, *saved, class_chunk, True, True)
        alone = (
            torch.ops.lsoftmax.shard_bwd(rows, *saved, class_chunk, True, False)[0],
            torch.ops.lsoftmax.shard_bwd(rows, *saved, class_chunk, False, True)[1],
        )
        assert all(torch.equal(a, b) for a, b in zip(both_at_once, alone, strict=True))
        assert (both_at_once[0].dtype, both_at_once[1].dtype) == (wide, dtype)
        dx = dx + both_at_once[0]
        dw.append(both_at_once[1])
    assert relative_error(dx, true_dx) <= bound
    assert relative_error(torch.cat(dw), true_dw) <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    """Schema, fake shapes, types, strides and functionalization, by torch's own checker."""
    p = problem(6, 5, 9, dtype, device)
    x, w, y = p.x.detach(), p.w.detach(), local(p.y, slice(2, 9))[:6]
    w = w[2:].contiguous()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lam, weight = torch.tensor(0.5, device=device), torch.rand(7, dtype=wide).to(device)
    for smoothing, save, chunk in ((None, True, 0), (weight, True, 3), (weight, False, 0)):
        args = (x, w, y, MARGIN, lam, smoothing, save, chunk)
        torch.library.opcheck(torch.ops.lsoftmax.shard_fwd.default, args)
        if save:
            e, sums = torch.ops.lsoftmax.shard_fwd(*args)
            rows = torch.rand(5, 6, dtype=wide).to(device)
            saved = (rows, x, w, y, smoothing, e, sums[0].to(wide), chunk)
            for needed in ((True, True), (True, False), (False, True)):
                torch.library.opcheck(torch.ops.lsoftmax.shard_bwd.default, (*saved, *needed))


def test_samples_are_fair() -> None:
    """Targets always; every other class as often as the next, and not the same ones on two ranks.

    Each of 37 classes has 7 of 37 chances in 400 draws: 76 times, with a deviation of 8.
    """
    sampling = ClassSampling(0.25, 0, torch.device("cpu"))
    counts, alike = torch.zeros(40), 0
    target = torch.tensor([3, -1, 3, 39, 17])
    for _ in range(400):
        chosen, other = (sampling(target, 40, rank) for rank in (0, 1))
        assert torch.equal(chosen, sampling(target, 40, 0))
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == 10
        counts[chosen] += 1
        alike += torch.equal(chosen, other)
        sampling.advance()
    positives = torch.tensor([3, 17, 39])
    assert (counts[positives] == 400).all()
    counts[positives] = 76
    assert counts.min() > 76 - 6 * 8
    assert counts.max() < 76 + 6 * 8
    assert alike == 0
    assert sampling.draws == 400
