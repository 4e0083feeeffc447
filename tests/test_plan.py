"""Which way round N x C is chosen, what it says of itself, and what the chunks do with memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import lsoftmax
from allocations import peak
from lsoftmax import _extension, functional
from lsoftmax import plan as planning
from lsoftmax.plan import Plan, choose
from problems import problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def chosen(n: int, d: int, c: int, device: torch.device = CUDA, **options) -> Plan:
    options = {"scalar": True, "dtype": torch.bfloat16, **options}
    return choose(n, d, c, options.pop("dtype"), device, **options)


def test_what_fits_is_kept() -> None:
    assert chosen(256, 512, 10_000, memory_budget=256 * 10_000 * 6)[:2] == (0, 0)
    assert chosen(256, 512, 10_000, memory_budget=256 * 10_000 * 6 - 1)[:2] != (0, 0)
    assert chosen(256, 512, 10_000, dtype=torch.float32, memory_budget=256 * 40_000)[:2] == (0, 0)


def test_little_is_kept_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask for the free memory takes time, and a small loss takes little: 64 MB, or a 256th."""
    monkeypatch.setattr(planning, "free_memory", lambda device: 1 / 0)
    kept = (256, 512, 65_536)  # 100 MB
    for gb, asks in ((8, True), (23, True), (25, False), (140, False)):
        gpu = type("GPU", (), {"total_memory": gb << 30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert chosen(256, 512, 10_000)[:2] == (0, 0)
        if asks:
            with pytest.raises(ZeroDivisionError):
                chosen(*kept)
        else:
            assert chosen(*kept)[:2] == (0, 0)
        with pytest.raises(ZeroDivisionError):
            chosen(4096, 512, 1_000_000)
    with pytest.raises(ZeroDivisionError):
        chosen(*kept, CPU)


def test_sizes_that_are_traced_can_be_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbols for sizes can be no keys of what is remembered."""
    monkeypatch.setattr(planning, "_LITTLE", 0)
    p = problem(8, 4, 20)

    def loss(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.lsoftmax_loss(x, w, y, 3, 1.0)

    given = p.x.detach(), p.w.detach(), p.y
    traced = make_fx(loss, tracing_mode="symbolic")(*given)
    torch.testing.assert_close(traced(*given), loss(*given))


def test_chunks_of_rows_count_what_they_sum_up() -> None:
    """dX and dW in the type of the logits; float16 has W in float32 beside its exponentials."""
    n, d, c = 65_536, 512, 100_000
    logits = {torch.float32: 4, torch.float16: 4, torch.float64: 8}
    more = {torch.float32: 0, torch.float16: 4 * c * d, torch.float64: 0}
    for dtype, size in logits.items():
        plan = chosen(n, d, c, dtype=dtype, memory_budget=20 << 30)
        rows = plan.row_chunk
        assert rows > 0
        assert plan.bytes == rows * c * size + (n + c) * d * size + more[dtype] <= 20 << 30


@pytest.mark.parametrize("free", [1 << 30, 16 << 30, 130 << 30])
def test_automatic_choice_keeps_to_a_quarter_of_what_is_free(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda device: free)
    monkeypatch.setattr(planning, "little_memory", lambda device: 0)
    for n, d, c in ((1024, 512, 100_000), (16_384, 512, 100_000), (4096, 512, 1_000_000)):
        for scalar in (True, False):
            assert chosen(n, d, c, scalar=scalar).bytes <= free / 4


def test_rows_only_where_they_pay() -> None:
    """Gradients in forward need a loss that is one number, room for dW, and many rows a chunk."""
    shape = (16_384, 512, 100_000)
    budget = 2 << 30
    assert chosen(*shape, memory_budget=budget).row_chunk >= 2048
    assert chosen(*shape, memory_budget=budget, scalar=False).row_chunk == 0
    assert chosen(*shape, memory_budget=budget, needs_grad=False).row_chunk == 0
    assert chosen(4096, 512, 1_000_000, memory_budget=budget).row_chunk == 0
    assert chosen(16_384, 512, 100_000, memory_budget=1 << 30).class_chunk > 0


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((512, 64, 16_384), 0),  # 32 MB, which malloc keeps
        ((512, 64, 16_385), 256),
        ((511, 64, 100_000), 0),  # no two chunks
        ((512, 129, 100_000), 0),  # of two rows a feature
        ((4096, 512, 10_000), 1024),
        ((65_536, 64, 1000), 4096),  # 16 MB
    ],
)
def test_a_cpu_chunks_what_malloc_would_not_keep(shape: tuple[int, int, int], rows: int) -> None:
    options = {"dtype": torch.float32, "memory_budget": 1 << 40}
    assert chosen(*shape, CPU, **options)[:2] == (0, rows)
    assert chosen(*shape, CPU, **options, scalar=False)[:2] == (0, 0)
    assert chosen(*shape, CPU, **options, needs_grad=False)[:2] == (0, 0)
    assert chosen(*shape, CUDA, **options)[:2] == (0, 0)


@pytest.mark.parametrize("budget", [1, 10**4, 10**6, 10**8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_chunks_keep_to_the_budget_and_are_alike(budget: int, dtype: torch.dtype) -> None:
    for n, c in ((1, 7), (100, 1001), (3000, 50_000), (70_000, 3)):
        plan = chosen(n, 16, c, CPU, dtype=dtype, memory_budget=budget)
        least = n * (8 * 8 + 84)  # there is no less: eight classes of float64, and the sums
        assert plan.bytes <= max(budget, least) * 1.1 + least
        total, chunk = (n, plan.row_chunk) if plan.row_chunk else (c, plan.class_chunk)
        if chunk:
            last = total % chunk or chunk
            assert plan.class_chunk % 8 == 0
            assert last > chunk - 8 * -(-total // chunk), "the last chunk is as large as the others"


def test_plan_reads_back_what_the_loss_does(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(40, 8, 1000, torch.float32)
    assert functional.plan(p.x, p.w)[:2] == (0, 0)
    seen = []
    real = functional.autograd.loss
    monkeypatch.setattr(
        functional.autograd, "loss", lambda *args: seen.append(args[-1]) or real(*args)
    )
    head = lsoftmax.LSoftmaxLoss(8, 1000, memory_budget=20_000)
    head(p.x, p.y)
    assert seen == [functional.plan(p.x, head.linear.weight, memory_budget=20_000)]
    assert seen[0].class_chunk > 0


def test_exponentials_alone_are_counted_where_they_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels take features to exponentials at once, and these features they can take."""
    monkeypatch.setattr(planning, "fuses_forward", lambda device: True)

    def taken(d: int = 8, dtype: torch.dtype = torch.bfloat16, **options) -> float:
        x, w = (torch.zeros(size, d, dtype=dtype) for size in (1000, 20_000))
        return functional.plan(x, w, memory_budget=1 << 30, **options).bytes / 1000 / 20_000

    assert 2 < taken() < 2.1
    assert taken(d=0) == taken(d=12) == taken(label_smoothing=0.1) == 6
    assert taken(dtype=torch.float16) == taken(dtype=torch.float32) == 4
    monkeypatch.setattr(planning, "fuses_forward", lambda device: False)
    assert taken() == 6


def test_what_is_little_needs_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of few classes, or of a few MB, asks for nothing."""
    for asks in ("fuses_forward", "free_memory", "little_memory"):
        monkeypatch.setattr(planning, asks, lambda device: 1 / 0)
    assert chosen(256, 512, 10_000, fusable=True)[:2] == (0, 0)
    assert chosen(1_000_000, 512, 256, fusable=True, memory_budget=1 << 40)[:2] == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_need_no_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are where a model is planned on a laptop for the machine that trains it."""

    def refuse(*_: object) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system")

    status = _extension.Status(built=True, loaded=True, reason="", archs="9.0a")
    monkeypatch.setattr(_extension, "_status", status)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("get_device_capability", "get_device_properties", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    for budget in (None, 1 << 28):
        assert chosen(4096, 512, 100_000, dtype=dtype, fusable=True, memory_budget=budget).bytes


def test_the_rule_is_that_of_the_kernels() -> None:
    sources = Path(__file__).resolve().parent.parent / "csrc"
    text = (sources / "fused_forward.cpp").read_text() + (sources / "hopper.h").read_text()
    constants = dict(re.findall(r"(k\w+) = (\d+)[,;]", text))
    ours = (planning._PILOT_CLASSES, planning._LEAST_TILES)
    assert ours == (int(constants["kPilotClasses"]), int(constants["kLeastTiles"]))
    tile = (planning._TILE_ROWS, planning._TILE_CLASSES)
    assert tile == (int(constants["kTileRows"]), int(constants["kTileClasses"]))


@pytest.mark.parametrize(
    ("fuses", "capability", "archs", "switch"),
    [
        (True, (9, 0), "8.0;9.0a", None),
        (True, (9, 0), "9.0a+PTX", "1"),
        (False, (9, 0), "8.0;9.0a", "0"),
        (False, (9, 0), "8.0;9.0", None),
        (False, (10, 0), "9.0a;10.0", None),
        (False, (9, 0), "", None),
    ],
)
def test_one_kernel_for_the_forward_pass_is_hoppers(
    fuses: bool, capability: tuple, archs: str, switch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = _extension.Status(built=True, loaded=bool(archs), reason="", archs=archs)
    monkeypatch.setattr(_extension, "_status", status)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("LSOFTMAX_FUSED_FORWARD", raising=False)
    if switch is not None:
        monkeypatch.setenv("LSOFTMAX_FUSED_FORWARD", switch)
    assert planning.fuses_forward(CUDA) is fuses
    assert not planning.fuses_forward(CPU)


@pytest.mark.parametrize("budget", [0, -1, 1.5, "1", True])
def test_bad_budgets(budget) -> None:
    p = problem(4, 3, 5)
    with pytest.raises((TypeError, ValueError), match="memory_budget: expected"):
        functional.lsoftmax_loss(p.x, p.w, p.y, memory_budget=budget)
    with pytest.raises((TypeError, ValueError), match="memory_budget: expected"):
        lsoftmax.LSoftmaxLoss(3, 5, memory_budget=budget)


def test_compiles_with_a_budget() -> None:
    torch._dynamo.reset()
    p = problem(12, 8, 500, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, budget: int) -> torch.Tensor:
        return functional.lsoftmax_loss(x, w, y, memory_budget=budget)

    for budget in (5000, 10**6):
        loss = functional.lsoftmax_loss(p.x, p.w, p.y, memory_budget=budget)
        expected = torch.autograd.grad(loss, (p.x, p.w))
        ours = compiled(p.x, p.w, p.y, budget)
        torch.testing.assert_close(ours, loss)
        for a, b in zip(torch.autograd.grad(ours, (p.x, p.w)), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "any number of rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_with_what_is_asked_of_the_device(
    dtype: torch.dtype, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking is no graph break: what the answers were are constants of the compiled code."""
    torch._dynamo.reset()
    monkeypatch.setattr(planning, "_LITTLE", 0)
    compiled = torch.compile(
        functional.lsoftmax_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for asked in (planning.free_memory, planning.little_memory, planning.fuses_forward):
        assert asked._dynamo_marked_constant  # of which a CPU notices the first alone
    for rows in (12, 20):
        p = problem(rows, 8, 300, dtype)
        torch.testing.assert_close(compiled(p.x, p.w, p.y), functional.lsoftmax_loss(p.x, p.w, p.y))


def test_peak_memory_of_a_million_classes() -> None:
    """What is held above inputs and gradients is a panel, whatever C; all logits are 64 MB."""
    n, d, c = 16, 8, 1_000_000
    p = problem(n, d, c, torch.float32)

    def step() -> None:
        loss = functional.lsoftmax_loss(p.x, p.w, p.y, memory_budget=8 << 20)
        torch.autograd.grad(loss, (p.x, p.w))

    step()
    assert 4 * c * d < peak(step) < 4 * (c * d + n * d) + (16 << 20)


def test_out_of_memory_says_what_to_do() -> None:
    """64 TB of logits cannot be had; nothing is changed, and a budget is named."""
    x = torch.randn(1, 1).expand(256, 1).requires_grad_()  # too few rows for chunks of them
    w = torch.randn(1, 1).expand(1 << 36, 1)
    y = torch.zeros(256, dtype=torch.int64)
    with pytest.raises(torch.OutOfMemoryError, match=r"\(256, 1\).*memory_budget=\d+"):
        functional.lsoftmax_loss(x, w, y, memory_budget=1 << 60)
    assert x.grad is None
