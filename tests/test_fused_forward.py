"""The forward pass in one kernel through the op: emulated, and with --backend cuda on Hopper.

test_hopper.py calls its three launches one by one. Here they run as a user's do, and on a GPU what
the emulation can't tell: whether the assembly does what the manual says.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import placed
from chunks import assert_close, bounds_for, fixed_arguments, run
from lsoftmax import functional
from problems import Problem, problem, relative_error, rounding_error, with_peaks

IGNORED = -100
SWITCH = "LSOFTMAX_FUSED_FORWARD"


@pytest.fixture
def hopper(backend: str) -> None:
    if backend == "portable":
        pytest.skip("needs kernels")
    if backend == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def both_ways(
    p: Problem, monkeypatch: pytest.MonkeyPatch, **options: object
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Loss and gradients by the forward pass in one kernel, and by the other."""
    monkeypatch.setenv(SWITCH, "0")
    apart = p.loss(**options)
    monkeypatch.setenv(SWITCH, "1")
    return p.loss(**options), apart


# Of 8 and 16 features a stage has but these: its other columns are outside of the matrices.
SMALL = [(70, 64, 300), (70, 64, 37), (1, 64, 10), (129, 136, 257), (33, 8, 300), (129, 16, 257)]
LARGE = [(300, 512, 5000), (2000, 512, 20_000), (5000, 64, 1000), (128, 2048, 1003)]  # on a GPU


@pytest.mark.parametrize("norm", [4.0, 2000.0], ids=["", "rows are done again"])
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
@pytest.mark.usefixtures("hopper")
def test_the_op_takes_it_when_asked(
    shape: tuple[int, int, int], norm: float, backend: str, device: str, monkeypatch
) -> None:
    """Behind its switch, through the op: the loss and the gradients of the other forward pass.

    With logits of some hundreds most rows lie outside of what a reference known beforehand covers.
    """
    if backend != "cuda" and shape in LARGE:
        pytest.skip("too large to emulate")
    p = problem(*shape, torch.bfloat16, device, norm=norm)
    p.y[3::5] = IGNORED
    weight = torch.rand(shape[2], device=device) + 0.5
    for options in ({"reduction": "mean"}, {"reduction": "none", "weight": weight}):
        options |= {"margin": 3, "lam": 0.5}
        fused, apart = both_ways(p, monkeypatch, **options)
        with torch.no_grad():
            silent = functional.lsoftmax_loss(p.x, p.w, p.y, **options)
        truth = p.true_loss(**options)
        assert relative_error(fused[0], truth[0]) < 1e-5
        torch.testing.assert_close(silent, fused[0])
        for ours, other, true in zip(fused[1:], apart[1:], truth[1:], strict=True):
            bound = max(2 * relative_error(other, true), 4e-3)
            assert relative_error(ours, true) <= bound


@pytest.mark.parametrize("shape", [*SMALL, (400, 64, 700), (2180, 200, 3001)], ids=str)
@pytest.mark.usefixtures("hopper")
def test_every_exponential(shape: tuple[int, int, int], device: str, monkeypatch) -> None:
    """One by one: a piece of a tile in a wrong place is little in the norm of a gradient.

    Logits are sums of small integers over 64: exact, however the tensor cores round.
    """
    n, d, c = shape
    x, w = (torch.randint(-4, 5, (rows, d)).to(device).bfloat16() / 8 for rows in (n, c))
    p = Problem(x, w, torch.randint(c, (n,)).to(device))
    p.y[3::5] = IGNORED
    monkeypatch.setenv(SWITCH, "1")
    _, e, rows, *_ = torch.ops.lsoftmax.loss_fwd(*fixed_arguments(p, ignore_index=IGNORED), True, 0)
    kept = p.y != IGNORED
    truth = torch.exp(x.double() @ w.double().t() - rows[4].double()[:, None])
    truth[kept, p.y[kept]] = 0
    truth[~kept] = 0
    # Half a unit in the last place of bfloat16, and float32's errors of an exponential.
    assert ((e[:, :c].double() - truth).abs() <= truth * (2**-8 + 2**-18) + 2e-38).all()
    assert e.dtype == torch.bfloat16
    assert (e[:, c:] == 0).all()


@pytest.mark.parametrize("norm", [4.0, 2000.0], ids=["", "rows are done again"])
@pytest.mark.parametrize("way", [("rows", 30), ("classes", 104), ("classes", 264)], ids=str)
@pytest.mark.usefixtures("hopper")
def test_chunks_take_it(way: tuple[str, int], norm: float, device: str, monkeypatch) -> None:
    """Chunks of rows in forward; of classes in backward, and in forward all at once where that
    takes no more memory than a chunk, as here 264.
    """
    p = problem(70, 64, 300, torch.bfloat16, device, norm=norm)
    p.y[::2] = (p.x @ p.w.t()).argmax(1)[::2]  # or a target among the others would be too little
    p.y[3::5] = IGNORED
    options = {"margin": 3, "lam": 0.5, "weight": torch.rand(300, device=device) + 0.5}
    monkeypatch.setenv(SWITCH, "0")
    apart = run(p, way, **options)
    monkeypatch.setenv(SWITCH, "1")
    chunked, whole = run(p, way, **options), run(p, ("classes", 0), **options)
    forward_apart = way[1] == 104
    # Fewer rows may have their pilot logits from another product, and so another reference.
    bits = {} if way[0] == "rows" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(chunked[0], (apart if forward_apart else whole)[0], **bits)
    assert forward_apart or not torch.equal(chunked[1], apart[1])
    assert_close(chunked, p.true_loss(**options), *bounds_for(p, **options))
    for ours, same in zip(chunked[1:], whole[1:], strict=True):
        # The same exponentials; sums in float32 here, rounded to bfloat16 there.
        assert relative_error(ours, same.double()) < 4e-3


@pytest.mark.parametrize("way", [("classes", 0), ("classes", 264), ("rows", 5)], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
@pytest.mark.parametrize("log_size", [10, 23, 30, 33, 40])
@pytest.mark.usefixtures("hopper")
def test_logits_of_any_size(
    log_size: int, exact: bool, way: tuple[str, int], device: str, monkeypatch
) -> None:
    """Of a logit of 2^33 a float knows the thousands, and exp(thousands) is no number.

    Sums of small integers times a power of two are the same logits however they are summed. Of
    others a row that is done again, and backward in chunks of classes, may have different ones, of
    which the exponentials are only to be numbers.
    """
    draw = (lambda *shape: torch.randint(-4, 5, shape) / 4.0) if exact else torch.randn
    # Of the features' numbers and the weights' each half of the size.
    x, w = (
        draw(n, 8).mul(2.0**half).bfloat16().to(device)
        for n, half in ((8, log_size // 2), (300, log_size - log_size // 2))
    )
    p = Problem(x.requires_grad_(), w.requires_grad_(), torch.randint(300, (8,)).to(device))
    monkeypatch.setenv(SWITCH, "1")
    ours = run(p, way, lam=0.0, reduction="sum")
    true = p.true_loss(margin=4, lam=0.0, reduction="sum")
    assert relative_error(ours[0], true[0]) < 1e-5
    assert all(part.isfinite().all() for part in ours)
    if not exact and way == ("classes", 264) and log_size > 20:
        return
    for part, expected in zip(ours[1:], true[1:], strict=True):
        assert relative_error(part, expected) < (1e-2 if exact or log_size < 26 else 0.5)


@pytest.mark.parametrize("above", [30.0, 41.0, 72.0, 79.0])
@pytest.mark.usefixtures("hopper")
def test_backward_apart_from_a_fused_forward(above: float, device: str, monkeypatch) -> None:
    """Chunks too small to fuse, of a loss that is not: what forward lets lie above a reference,
    the row pass' slack and more, backward must not cut off.
    """
    # Rows enough that the roundings of their few large numbers are like those the bound goes by.
    p = with_peaks([{20_000 + i: above} for i in range(16)], 32, 128 * 256, torch.bfloat16, device)
    monkeypatch.delenv(SWITCH, raising=False)
    ours, true = run(p, ("classes", 512)), p.true_loss(margin=4, lam=0.0)
    assert_close(ours, true, 1e-5, 2 * rounding_error(p, torch.bfloat16))


@pytest.mark.parametrize(("classes", "taken"), [(128 * 256, True), (127 * 256, False)])
@pytest.mark.usefixtures("hopper")
def test_taken_by_size(classes: int, taken: bool, device: str, monkeypatch) -> None:
    """128 tiles keep a device busy; with fewer the product and the row pass are as fast."""
    p = problem(2, 8, classes, torch.bfloat16, device)
    fused, apart = both_ways(p, monkeypatch)
    monkeypatch.delenv(SWITCH)
    for chosen, expected in zip(p.loss(), fused if taken else apart, strict=True):
        assert torch.equal(chosen, expected)
    assert not torch.equal(fused[2], apart[2])


@pytest.mark.usefixtures("hopper")
def test_taken_wherever_the_matrices_lie(device: str, monkeypatch) -> None:
    """Bulk copies begin at multiples of 16 bytes: a matrix that does not is copied, as the plan of
    the memory relies on.
    """
    p = problem(70, 64, 300, torch.bfloat16, device)
    odd = Problem(*(placed(m.detach(), "misaligned") for m in (p.x, p.w)), p.y)
    assert odd.x.data_ptr() % 16 != 0 != odd.w.data_ptr() % 16
    monkeypatch.setenv(SWITCH, "1")
    _, e, rows, *_ = torch.ops.lsoftmax.loss_fwd(*fixed_arguments(p), True, 0)
    ours = torch.ops.lsoftmax.loss_fwd(*fixed_arguments(odd), True, 0)
    assert torch.equal(ours[1], e)
    assert torch.equal(ours[2], rows)


@pytest.mark.usefixtures("hopper")
def test_few_classes_are_no_tile(device: str, backend: str, monkeypatch) -> None:
    if backend != "cuda":
        pytest.skip("too large to emulate")
    p = problem(128 * 128, 64, 256, torch.bfloat16, device)
    _, apart = both_ways(p, monkeypatch)
    monkeypatch.delenv(SWITCH)
    assert torch.equal(p.loss()[2], apart[2])


@pytest.mark.usefixtures("hopper")
def test_the_switch_changes_the_bits(device: str, monkeypatch) -> None:
    """Or the tests here would be of the other forward pass."""
    fused, apart = both_ways(problem(70, 64, 300, torch.bfloat16, device), monkeypatch)
    assert not torch.equal(fused[1], apart[1])


@pytest.mark.usefixtures("hopper")
def test_its_bits_repeat(backend: str, device: str, monkeypatch) -> None:
    """A race between the copy engine, the tensor cores and the epilogue would show in time."""
    shape, times = ((1500, 512, 9000), 100) if backend == "cuda" else ((70, 64, 300), 2)
    p = problem(*shape, torch.bfloat16, device)
    first, _ = both_ways(p, monkeypatch)
    for _ in range(times):
        assert all(torch.equal(a, b) for a, b in zip(p.loss(), first, strict=True))


@pytest.mark.usefixtures("hopper")
def test_captured(backend: str, device: str, monkeypatch) -> None:
    """In a CUDA graph, replayed on other features: what is prepared on the host stays right."""
    if backend != "cuda":
        pytest.skip("needs a GPU")
    monkeypatch.setenv(SWITCH, "1")
    p, other = (problem(300, 64, 1000, torch.bfloat16, device) for _ in range(2))
    for _ in range(2):
        p.loss()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = p.loss()
    with torch.no_grad():
        p.x.copy_(other.x)
    graph.replay()
    for value, expected in zip(captured, p.loss(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.usefixtures("hopper")
def test_sanitizer_smoke_of_hopper(device: str, monkeypatch) -> None:
    """Tails in every dimension, and a row to do again: see test_loss.py's."""
    p = problem(70, 72, 300, torch.bfloat16, device)
    p.w.data[299], p.y[5] = 100 * p.x.data[5], 0  # far from 256 pilots, and above them
    fused, _ = both_ways(p, monkeypatch, margin=3)
    assert all(part.isfinite().all() for part in fused)
