"""What only the emulation can tell of the engine: launches, the order of turns, huge offsets.

These run with ``--backend emulation``: elsewhere nothing counts, and nothing is so cheap to fake.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chunks import fixed_arguments, run
from emulation import build
from lsoftmax import LambdaSchedule, LSoftmaxLoss
from problems import Problem, problem


@pytest.fixture(autouse=True)
def _on_the_emulation(backend: str, device: str) -> None:
    if backend not in ("emulation", "sanitized"):
        pytest.skip("needs --backend emulation")


@pytest.fixture
def engine(backend: str) -> ctypes.CDLL:
    library = ctypes.CDLL(build.load(sanitize=backend == "sanitized").__file__)
    return library


def launches(engine: ctypes.CDLL, work) -> int:
    before = build.counters(engine)["launches"]
    work()
    return build.counters(engine)["launches"] - before


# ---- launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(512, 2, 10), (256, 16, 10)])
def test_tiny_shapes_take_two_kernels_each_way(
    shape: tuple[int, int, int], dtype: torch.dtype, engine: ctypes.CDLL
) -> None:
    """Beside the matrix products; with label smoothing and class weights too."""
    p = problem(*shape, dtype)
    weight = torch.rand(shape[2])
    for options in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "weight": weight}):
        fixed = fixed_arguments(p, **options)
        saved = torch.ops.lsoftmax.loss_fwd(*fixed, True, 0)
        assert launches(engine, lambda f=fixed: torch.ops.lsoftmax.loss_fwd(*f, True, 0)) == 2
        arguments = (torch.ones(()), *fixed[:3], fixed[5], *saved[1:4], -100, fixed[8], 0)
        for needs in ((True, True), (True, False), (False, True)):
            work = lambda n=needs, a=arguments: torch.ops.lsoftmax.loss_bwd(*a, *n)  # noqa: E731
            assert launches(engine, work) == 2


def test_launches_of_the_chunks(engine: ctypes.CDLL) -> None:
    """Forward a kernel a chunk of classes, backward two; of rows three a chunk, and two sums."""
    p = problem(20, 8, 100, torch.float32)
    # Of classes: 4 x loss_rows, loss_sum; backward_rows, 4 x (exponentials, finish), finish of dX.
    assert launches(engine, lambda: run(p, ("classes", 30))) == (4 + 1) + (1 + 4 * 2 + 1)
    # Of rows: loss_sum, 4 x (loss_rows, backward_rows, finish), loss_sum.
    assert launches(engine, lambda: run(p, ("rows", 6))) == 1 + 4 * 3 + 1


def forward_of_a_shard(p: Problem, chunk: int) -> tuple[Tensor, Tensor]:
    args = (p.x, p.w, p.y - 1, 3, torch.tensor(0.5), torch.ones_like(p.w[:, 0]), True, chunk)
    return torch.ops.lsoftmax.shard_fwd(*args)[:2]


def backward_of_a_shard(p: Problem, e: Tensor, sums: Tensor, chunk: int, *needs: bool) -> list:
    shares = torch.linspace(-1, 1, 5)[:, None] * (p.y > 0)
    saved = (p.x, p.w, p.y - 1, torch.ones_like(p.w[:, 0]), e, sums[0].float(), chunk)
    return list(torch.ops.lsoftmax.shard_bwd(shares, *saved, *needs))


def test_launches_of_a_shard(engine: ctypes.CDLL) -> None:
    """Forward a kernel; backward one for dX and two for dW. Of chunks as above."""
    p = problem(20, 8, 100, torch.float32)
    with torch.no_grad():
        assert launches(engine, lambda: forward_of_a_shard(p, 0)) == 1
        assert launches(engine, lambda: forward_of_a_shard(p, 30)) == 4
        saved = forward_of_a_shard(p, 0)
        for chunk, needs, count in (
            (0, (True, False), 1),
            (0, (False, True), 2),
            (30, (True, True), 1 + 4 * 2 + 1),
        ):
            work = lambda c=chunk, n=needs: backward_of_a_shard(p, *saved, c, *n)  # noqa: E731
            assert launches(engine, work) == count


def test_launches_of_annealing(engine: ctypes.CDLL) -> None:
    """Beside the loss's two the next lam and the step; four more where classes count alike."""
    x, y = torch.randn(5, 8), torch.tensor([0, 1, 2, 2, -100])
    for counted, count in ((None, 4), (9000, 8)):
        schedule = LambdaSchedule.by_angle(num_classes=counted)
        head = LSoftmaxLoss(8, 9000, lam=schedule)
        assert launches(engine, lambda head=head: head(x, y)) == count


# ---- bytes ---------------------------------------------------------------------------------------

SAMPLE = 512 * 4 * 16  # bytes of a row that loss_rows looks at first: threads x packs x bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_logit_is_read_once_and_its_exponential_written_once(
    dtype: torch.dtype, engine: ctypes.CDLL
) -> None:
    """docs/performance.md's floors, to the byte; but that a row's first logits, at most 32 KB, are
    read again, from the cache. Red for a kernel that passes over a row twice.
    """
    n, d = 6, 16
    size, z, e = (
        dtype.itemsize,
        max(4, dtype.itemsize),
        dtype.itemsize,
    )  # bytes of a feature, a logit, an exponential
    margin = n * 2 * d * size
    chunk = min(SAMPLE, z * 5000)
    for c, way, sampled, passes in (
        (20_000, ("classes", 0), SAMPLE, 1),
        (20_000, ("rows", 2), SAMPLE, 1),
        (20_000, ("classes", 5000), 4 * chunk, 2),
        (20_003, ("classes", 5000), 4 * chunk + 3 * z, 2),  # no pack beyond the last class
    ):
        p, read = problem(n, d, c, dtype), passes * z * n * c
        before = build.counters(engine)
        run(p, way)
        moved = {name: count - before[name] for name, count in build.counters(engine).items()}
        assert moved["bytes_read"] == read + n * sampled + margin, way
        assert moved["bytes_written"] == e * n * c, way


# ---- the order of turns --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_turns_does_not_matter(dtype: torch.dtype, engine: ctypes.CDLL) -> None:
    """Blocks and threads that race for global memory would show here."""
    p = problem(40, 9, 70, dtype)
    for way in (("classes", 0), ("classes", 16), ("rows", 12)):
        results = run(p, way, label_smoothing=0.1, reduction="sum")
        with build.reversed_order(engine):
            again = run(p, way, label_smoothing=0.1, reduction="sum")
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_the_order_of_turns_does_not_matter_to_a_shard(engine: ctypes.CDLL) -> None:
    p = problem(40, 9, 70, torch.float32)

    def both(chunk: int) -> list[Tensor]:
        with torch.no_grad():
            e, sums = forward_of_a_shard(p, chunk)
            return [e, sums, *backward_of_a_shard(p, e, sums, chunk, True, True)]

    for chunk in (0, 16):
        results = both(chunk)
        with build.reversed_order(engine):
            again = both(chunk)
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_the_order_of_turns_does_not_matter_to_annealing(engine: ctypes.CDLL) -> None:
    """Where rows of one class are added up, and classes of several blocks."""
    x, y = torch.randn(600, 8), torch.randint(3, (600,)) * 2000
    first = LSoftmaxLoss(8, 5000, lam=LambdaSchedule.by_angle(num_classes=5000))
    again = copy.deepcopy(first)
    for head in (first, again):
        with build.reversed_order(engine) if head is again else nullcontext():
            head(x, y)
    for ours, theirs in zip(first.schedule.buffers(), again.schedule.buffers(), strict=True):
        assert torch.equal(ours, theirs)


# ---- more than 2^31 elements ---------------------------------------------------------------------

# Offsets of a second row, or of a last class, that 32 bits do not hold: in a file with holes, which
# takes memory only where it is touched. A wrong offset reads zeros or nothing that is there.
FAR = 2**31 + 16

Pointer, Count = ctypes.c_void_p, ctypes.c_int64


def sparse(path: Path, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    name = path / f"{len(list(path.iterdir()))}.bin"
    return torch.from_file(str(name), shared=True, size=count, dtype=torch.float32).view(shape)


def structure(pointers: str, counts: str, *more: tuple[str, type]) -> type:
    fields = [(name, Pointer) for name in pointers.split()]
    fields += [(name, Count) for name in counts.split()]
    return type("Params", (ctypes.Structure,), {"_fields_": [*fields, *more]})


# As in csrc/lsoftmax.h.
LossRows = structure(
    "x w target lam class_weight weight_sum z e state row_loss rows row_cosine",
    "n d c first_class width z_stride e_stride ignore_index",
    ("label_smoothing", ctypes.c_double),
    ("margin", ctypes.c_int),
    ("target_in_e", ctypes.c_bool),
)
Exponentials = structure(
    "target reference rows class_weight z e",
    "n first_class width stride ignore_index",
    ("class_weights", ctypes.c_bool),
)
FinishGradients = structure(
    "x w target order scale input weight rest constant product dx dw", "n d first_class width"
)
MarginLogits = structure(
    "x w target lam logits coefficients row_cosine", "n d c", ("margin", ctypes.c_int)
)
MarginLogitsBackward = structure("target coefficients grad shares order", "n c")


def launch(engine: ctypes.CDLL, name: str, kind: type, **values: Tensor | float | None) -> None:
    """Call a launcher; a tensor stands for its address."""
    params = kind(**{k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()})
    function = getattr(engine, f"engine_{name}")
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    assert function(ctypes.byref(params)).decode() == ""


def small() -> tuple[Problem, dict]:
    p = problem(2, 4, 40, torch.float32)
    p.x.requires_grad_(False), p.w.requires_grad_(False)
    lam = torch.tensor(0.5)
    shared = {"x": p.x, "w": p.w, "target": p.y, "lam": lam, "n": 2, "d": 4, "c": 40, "margin": 3}
    return p, shared


def test_rows_of_logits_far_apart(engine: ctypes.CDLL, tmp_path: Path) -> None:
    """loss_rows and exponentials, at more than 2^31 logits, as with rows side by side."""
    p, shared = small()
    shared |= {"width": 40, "ignore_index": -100, "label_smoothing": 0.1}
    results = []
    for stride in (40, FAR):
        z = sparse(tmp_path, 2, stride)
        e = sparse(tmp_path, 3, stride)
        outcome = {}
        for name, target in (("read", None), ("write", e), ("in place", z)):
            if target is z and stride == 40:
                z = sparse(tmp_path, 3, stride)  # room for the class weights
            z = sparse(tmp_path, 3, stride) if target is z else z
            target = z if name == "in place" else target
            z[:2, :40] = p.x @ p.w.t()
            loss, rows = torch.zeros(2), torch.zeros(5, 2)
            strides = {"z_stride": stride, "e_stride": stride}
            outputs = {"z": z, "e": target, "row_loss": loss, "rows": rows}
            launch(engine, "loss_rows", LossRows, **shared, **strides, **outputs)
            outcome[name] = (loss, rows)
            if target is not None:
                outcome[name] += (target[:, :40].clone(),)
        z[:2, :40] = p.x @ p.w.t()
        names = ("target", "n", "width", "ignore_index")
        launch(
            engine,
            "exponentials",
            Exponentials,
            **{name: shared[name] for name in names},
            reference=outcome["read"][1][4],
            z=z,
            e=e,
            stride=stride,
            class_weights=True,
        )
        outcome["again"] = (e[:, :40].clone(),)
        results.append(outcome)
    for name, values in results[0].items():
        for near, far in zip(values, results[1][name], strict=True):
            assert torch.equal(near, far), name
    torch.testing.assert_close(results[1]["again"][0], results[1]["write"][2])


def test_classes_beyond_32_bits(engine: ctypes.CDLL, tmp_path: Path) -> None:
    """A target whose row of W, of dW and whose column of the logits are that far out."""
    p, shared = small()
    c, y = FAR // 4 + 8, FAR // 4 + 5
    rows = p.w[torch.tensor([3, y % 40])]
    near = {**shared, "w": rows, "target": torch.tensor([0, 1]), "c": 2}
    shared |= {"w": sparse(tmp_path, c, 4), "target": torch.tensor([3, y]), "c": c}
    shared["w"][shared["target"]] = rows

    shares = {name: torch.rand(2) for name in ("scale", "input", "weight", "rest")}
    shares["order"] = torch.tensor([0, 1])
    product = torch.randn(2, 4)
    gradients = []
    for which, grown in ((near, torch.zeros(2, 4)), (shared, sparse(tmp_path, c, 4))):
        dx = torch.zeros(2, 4)
        known = {name: which[name] for name in ("x", "w", "target", "n", "d")}
        outputs = {"width": which["c"], "product": product, "dx": dx, "dw": grown}
        launch(engine, "finish_gradients", FinishGradients, **known, **shares, **outputs)
        gradients.append((dx, grown[which["target"]].clone()))
    for close, far in zip(*gradients, strict=True):
        assert close.any()
        assert torch.equal(close, far)

    results = []
    for which in (near, shared):
        logits, coefficients = sparse(tmp_path, 2, which["c"]), torch.zeros(3, 2)
        outputs = {"logits": logits, "coefficients": coefficients}
        outputs["row_cosine"] = torch.zeros(2)
        launch(engine, "margin_logits", MarginLogits, **which, **outputs)
        at = torch.arange(2), which["target"]
        found = logits[at].clone()
        logits[at] = torch.tensor([1.0, 2.0])
        out, order = torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)
        counts = {name: which[name] for name in ("target", "n", "c")}
        inputs = {"coefficients": coefficients, "grad": logits, "shares": out, "order": order}
        launch(engine, "margin_logits_backward", MarginLogitsBackward, **counts, **inputs)
        results.append((found, coefficients, out, order))
    for close, far in itertools.chain(zip(*results, strict=True)):
        assert close.any()
        assert torch.equal(close, far)
