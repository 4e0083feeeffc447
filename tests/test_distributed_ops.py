"""The shard ops on their own, added up by hand: shards of the classes in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from problems import Problem, problem, relative_error

SIZES = (13, 1, 16)
MARGIN = 3
IGNORED = -100  # functional's default
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
GRADIENT_BOUND = dict(zip(DTYPES, (1e-11, 1e-5, 2e-3, 1e-2), strict=True))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def shards_of(sizes: tuple[int, ...]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def local(y: Tensor, shard: slice) -> Tensor:
    return torch.where((y >= shard.start) & (y < shard.stop), y - shard.start, -1)


def added_up(
    p: Problem,
    sizes: tuple[int, ...],
    class_chunk: int = 0,
    lam: float = 0.5,
    smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dX and dW of the sum of the losses, for an upstream gradient of 0.5.

    What is done here with the sums of the shards follows from the definitions in docs/design.md,
    not from the code that does it in the package.
    """
    c, device, dtype = p.w.shape[0], p.x.device, p.x.dtype
    kept = p.y != IGNORED
    x, w = p.x.detach(), p.w.detach()
    weight = torch.ones(c, device=device) if weight is None else weight
    weight = weight.double()
    shards = [
        (w[s].contiguous(), local(p.y, s), weight[s].to(wide(dtype))) for s in shards_of(sizes)
    ]
    shards = [(rows, y, of_shard if smoothing else None) for rows, y, of_shard in shards]
    options = MARGIN, torch.tensor(lam, device=device)
    forward = [
        torch.ops.lsoftmax.shard_fwd(x, rows, y, *options, of_shard, True, class_chunk)
        for rows, y, of_shard in shards
    ]
    sums = torch.stack([s for _, s, _ in forward])  # (shards, 7, N)
    lse = torch.logsumexp(sums[:, 0] + sums[:, 1].log(), 0)  # L
    weighted, f, alpha, beta, gamma = sums[:, 2:].sum(0)
    own = weight[p.y.where(kept, 0)].where(kept, 0.0)
    uniform = smoothing / c * kept.double()
    total = (1 - smoothing) * own + uniform * weight.sum()  # A
    both = torch.logaddexp(lse, f)
    q_y = (1 - smoothing) * own + uniform * own
    gap = lse - f
    t = -torch.sigmoid(gap)
    target_gradient = total * t + (total - q_y)  # A p_y - q_y
    if smoothing:
        loss = total * both - q_y * f - uniform * weighted
    else:
        # Not F.softplus, which is its argument beyond 20.
        loss, target_gradient = own * torch.logaddexp(gap, torch.zeros_like(gap)), own * t

    dx, dw = torch.zeros_like(x, dtype=wide(dtype)), []
    shares = target_gradient * torch.stack((beta, gamma, alpha))
    shares[2] += uniform * own  # the constant is in its column too
    for (rows_of_w, y, of_shard), (e, s, _) in zip(shards, forward, strict=True):
        scale = total * torch.exp(s[0] - both)
        rows = torch.cat((scale[None], shares.where(y >= 0, 0.0), -uniform[None]))
        rows = (0.5 * rows).to(wide(dtype))
        saved = (x, rows_of_w, y, of_shard, e, s[0].to(wide(dtype)), class_chunk)
        both_at_once = torch.ops.lsoftmax.shard_bwd(rows, *saved, True, True)
        dx_alone, no_dw = torch.ops.lsoftmax.shard_bwd(rows, *saved, True, False)
        no_dx, dw_alone = torch.ops.lsoftmax.shard_bwd(rows, *saved, False, True)
        assert torch.equal(both_at_once[0], dx_alone)
        assert torch.equal(both_at_once[1], dw_alone)
        assert no_dx.shape == no_dw.shape == (0,)
        assert (dx_alone.dtype, dw_alone.dtype) == (wide(dtype), dtype)
        dx = dx + dx_alone
        dw.append(dw_alone)
    return loss.sum(), dx, torch.cat(dw)


def assert_adds_up(
    p: Problem, sizes: tuple[int, ...], class_chunk: int = 0, bound: float = 0.0, **options
) -> None:
    """To the float64 truth."""
    ours = added_up(p, sizes, class_chunk, **options)
    options["label_smoothing"] = options.pop("smoothing", 0.0)
    truth = p.true_loss(reduction="sum", margin=MARGIN, **{"lam": 0.5, **options})
    loss_bound = 1e-12 if p.x.dtype == torch.float64 else 1e-6
    bounds = (loss_bound, *[bound or GRADIENT_BOUND[p.x.dtype]] * 2)
    for name, value, true, limit in zip(("loss", "dx", "dw"), ours, truth, bounds, strict=True):
        assert value.shape == true.shape, name
        error = relative_error(value, true)
        assert error <= limit, f"{name}: {error:.2g}"


@pytest.mark.parametrize("norm", [4.0, 60.0])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("class_chunk", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_add_up(
    dtype: torch.dtype, class_chunk: int, smoothed: bool, norm: float, device: str
) -> None:
    """With ignored rows, features 0, as the layer makes them."""
    p = problem(24, 12, 30, dtype, device, norm)
    with torch.no_grad():
        p.y[5::7] = IGNORED
        p.x[p.y == IGNORED] = 0.0
    weight = (torch.rand(30) + 0.5).to(device).double()
    smoothing = 0.1 if smoothed else 0.0
    assert_adds_up(p, SIZES, class_chunk, weight=weight, smoothing=smoothing)


@pytest.mark.parametrize("class_chunk", [0, 520])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "d", "sizes"),
    [
        (0, 7, (2, 1)),
        (1, 1, (1,)),
        (1, 64, (1001, 2)),
        (33, 1, (2, 1, 1001)),
        (5, 7, (4099, 1)),
        (7, 513, (1001, 2)),
        (600, 3, (2, 5)),
    ],
    ids=str,
)
def test_shapes(
    n: int, d: int, sizes: tuple[int, ...], dtype: torch.dtype, class_chunk: int, device: str
) -> None:
    """No rows and one; ragged packs; a class a shard; several rows of each class."""
    p = problem(n, d, sum(sizes), dtype, device)
    if d == 1:  # a gradient of 0 in one dimension is rounding: margins there are all or nothing
        p.x.detach().abs_(), p.w.detach().abs_()
    assert_adds_up(p, sizes, class_chunk, smoothing=0.1 if n in (5, 33) else 0.0)


@pytest.mark.parametrize("class_chunk", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_targets_of_one_shard(dtype: torch.dtype, class_chunk: int, device: str) -> None:
    """The other shards' margins are 0; of one class that is the target, there are no others."""
    p = problem(9, 12, 30, dtype, device)
    p.y.fill_(13)
    assert_adds_up(p, SIZES, class_chunk)
    x, w, lam = p.x.detach(), p.w.detach(), torch.tensor(0.5, device=device)
    for shard in shards_of(SIZES):
        args = (x, w[shard].contiguous(), local(p.y, shard), MARGIN, lam, None, False, class_chunk)
        e, sums, cosines = torch.ops.lsoftmax.shard_fwd(*args)
        assert e.numel() == 0
        if shard.start == 13:
            assert (sums[0] == -torch.finfo(torch.float32).max).all()
            assert (sums[1:3] == 0).all()
            assert (sums[4] != 0).all()
            truth = F.cosine_similarity(x.double(), w[p.y].double())
            torch.testing.assert_close(cosines.double(), truth, rtol=0, atol=1e-6)
        else:
            assert (cosines == 0).all()
            z = x.double() @ w[shard].double().t()
            assert (sums[2:] == 0).all()
            torch.testing.assert_close(sums[0] + sums[1].log(), z.logsumexp(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("class_chunk", [0, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_logit_dominates(dtype: torch.dtype, class_chunk: int, device: str) -> None:
    """By e^90 and e^200, behind those that a row's reference is guessed from; as another class, and
    as the target, where all others' exponentials vanish beside it.
    """
    p = problem(4, 8, 9010, dtype, device)
    with torch.no_grad():
        p.w[:, 0] = 0.0
        p.w[9003] = torch.tensor([1.0, *[0.0] * 7])
        p.x[:, 0] = torch.tensor([90.0, 90.0, 200.0, 200.0])
        p.y.copy_(torch.tensor([9003, 3, 9003, 9008]))
    assert_adds_up(p, (9006, 4), class_chunk, lam=0.0)


@pytest.mark.parametrize("class_chunk", [0, 5])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_well_classified(dtype: torch.dtype, smoothed: bool, class_chunk: int, device: str) -> None:
    """1 - p_y about 1e-9: loss and gradient keep their digits. (Not in float16, which has no such
    numbers; and of float64 the reference knows no better.)
    """
    p = problem(20, 30, 30, dtype, device, norm=0.3)
    with torch.no_grad():
        p.w.copy_(torch.eye(30))
        p.x.add_(24 * p.w[p.y])
    assert_adds_up(p, SIZES, class_chunk, smoothing=0.1 if smoothed else 0.0)


@pytest.mark.parametrize("class_chunk", [0, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_repeats(dtype: torch.dtype, class_chunk: int, device: str) -> None:
    """The same bits in every run, and from tensors that are not contiguous."""
    p = problem(40, 24, 16, dtype, device)
    x, w, y = p.x.detach(), p.w.detach(), local(p.y, slice(2, 18))
    smoothing = torch.rand(16).to(device, wide(dtype))
    lam, rows = torch.tensor(0.5, device=device), torch.rand(5, 40).to(device, wide(dtype))
    rows[1:4].mul_(y >= 0)

    def run(x: Tensor, w: Tensor, y: Tensor, smoothing: Tensor, rows: Tensor) -> list[Tensor]:
        e, sums, cosines = torch.ops.lsoftmax.shard_fwd(
            x, w, y, 3, lam, smoothing, True, class_chunk
        )
        saved = (smoothing, e, sums[0].to(wide(dtype)), class_chunk, True, True)
        return [e, sums, cosines, *torch.ops.lsoftmax.shard_bwd(rows, x, w, y, *saved)]

    def strided(t: Tensor) -> Tensor:
        return torch.stack((t, torch.full_like(t, 3)), -1)[..., 0]

    first = run(x, w, y, smoothing, rows)
    again = run(x, w, y, smoothing, rows)
    others = run(*(strided(t) for t in (x, w.t().contiguous().t(), y, smoothing, rows)))
    for a, b, c in zip(first, again, others, strict=True):
        assert torch.equal(a, b)
        # Other strides are added up in another order, and rounded the other way in 16 bits.
        near = max(1e-5, GRADIENT_BOUND[a.dtype])
        torch.testing.assert_close(a, c, rtol=near, atol=near)


@pytest.mark.parametrize("class_chunk", [0, 5])
def test_gradients_that_are_not_finite(class_chunk: int, device: str) -> None:
    """As a scaler of gradients meets them: NaN comes out, and nothing is read that is not there."""
    p = problem(6, 12, 13, torch.float32, device)
    x, w, y = p.x.detach(), p.w.detach(), torch.tensor([-1, -1, -1, 4, 0, -1], device=device)
    lam = torch.tensor(0.5, device=device)
    e, sums, _ = torch.ops.lsoftmax.shard_fwd(x, w, y, 3, lam, None, True, class_chunk)
    rows = torch.rand(5, 6).to(device)
    rows[1:4].mul_(y >= 0)
    rows[:, 2:4] *= torch.nan
    saved = (x, w, y, None, e, sums[0].float(), class_chunk, True, True)
    dx, dw = torch.ops.lsoftmax.shard_bwd(rows, *saved)
    assert dx.isnan().all(1).tolist() == [False, False, True, True, False, False]
    assert dw.isnan().all()


def test_the_engine_checks_shards_for_itself(device: str, backend: str) -> None:
    """The ops can be called past the layer's checks: no kernel may read outside its tensors."""
    if backend == "portable":
        pytest.skip("torch checks there")
    x, w = torch.randn(4, 6).to(device), torch.randn(7, 6).to(device)
    y, lam = torch.full((4,), -1).to(device), torch.tensor(0.0, device=device)

    def run(x=x, w=w, y=y, margin=4, lam=lam, smoothing=None, chunk=0):
        return torch.ops.lsoftmax.shard_fwd(x, w, y, margin, lam, smoothing, True, chunk)

    ones = torch.ones(8, device=device)
    wrong = [
        {"x": x[0]}, {"x": x[:, :2]}, {"x": x.double()}, {"w": w[:0]}, {"y": y[:2]},
        {"y": y.int()}, {"margin": 0}, {"lam": lam.double()}, {"smoothing": ones}, {"chunk": -1},
        {"smoothing": ones[:7].double()},
    ]  # fmt: skip
    for case in wrong:
        with pytest.raises(RuntimeError, match="expected"):
            run(**case)
    e, sums, _ = run()
    rows, reference = torch.rand(5, 4).to(device), sums[0].float()
    wrong = [
        {"e": e[:2]}, {"e": e[:, :6]}, {"smoothing": ones[:7]}, {"rows": rows[:4]},
        {"rows": rows.double()}, {"reference": reference[:3]}, {"reference": sums[0]},
    ]  # fmt: skip
    for changed in wrong:
        parts = {"rows": rows, "smoothing": None, "e": e, "reference": reference, **changed}
        saved = (x, w, y, parts["smoothing"], parts["e"], parts["reference"], 0, True, True)
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.lsoftmax.shard_bwd(parts["rows"], *saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sanitizer_smoke_of_shards(dtype: torch.dtype, device: str) -> None:
    """Both regimes with every option, for the tools that are slow: see test_loss.py's."""
    p = problem(5, 9, 30, dtype, device)
    for class_chunk in (0, 5):
        assert_adds_up(p, SIZES, class_chunk)
        assert_adds_up(p, SIZES, class_chunk, smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    """Schema, fake shapes, types, strides and functionalization, by torch's own checker."""
    p = problem(6, 5, 9, dtype, device)
    x, w, y = p.x.detach(), p.w.detach(), local(p.y, slice(2, 9))[:6]
    w = w[2:].contiguous()
    lam, weight = torch.tensor(0.5, device=device), torch.rand(7, dtype=wide(dtype)).to(device)
    for smoothing, save, chunk in ((None, True, 0), (weight, True, 3), (weight, False, 0)):
        args = (x, w, y, MARGIN, lam, smoothing, save, chunk)
        torch.library.opcheck(torch.ops.lsoftmax.shard_fwd.default, args)
        if save:
            e, sums, _ = torch.ops.lsoftmax.shard_fwd(*args)
            rows = torch.rand(5, 6, dtype=wide(dtype)).to(device)
            saved = (rows, x, w, y, smoothing, e, sums[0].to(wide(dtype)), chunk)
            for needed in ((True, True), (True, False), (False, True)):
                torch.library.opcheck(torch.ops.lsoftmax.shard_bwd.default, (*saved, *needed))
