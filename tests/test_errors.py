"""Bad input, from every public entry: a clear error of the right kind, and the next call works."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lsoftmax
from lsoftmax import functional
from problems import problem

N, D, C = 4, 3, 5


def arguments() -> dict:
    return {
        "input": torch.randn(N, D),
        "linear_weight": torch.randn(C, D),
        "target": torch.arange(N),
    }


BOTH = [  # what is wrong, the error, what its text must name
    ({"margin": 0}, ValueError, "margin.*>= 1.*got 0"),
    ({"margin": -3}, ValueError, "margin.*got -3"),
    ({"margin": 2.0}, TypeError, "margin.*float"),
    ({"margin": 2**62}, ValueError, "margin.*<= 1000.*got 4611686018427387904"),
    ({"margin": torch.zeros(2)}, TypeError, r"margin.*integer.*\(2,\)"),
    ({"margin": True}, TypeError, "margin.*bool"),
    ({"margin": "4"}, TypeError, "margin.*str"),
    ({"lam": -0.1}, ValueError, "lam.*>= 0.*got -0.1"),
    ({"lam": math.inf}, ValueError, "lam.*finite.*inf"),
    ({"lam": math.nan}, ValueError, "lam.*finite.*nan"),
    ({"lam": 1e39}, ValueError, r"lam.*float32.*1e\+39"),
    ({"lam": 10**400}, ValueError, "lam.*float32"),
    ({"lam": "1"}, TypeError, "lam.*str"),
    ({"lam": torch.zeros(2)}, TypeError, r"lam.*0-dim.*\(2,\)"),
    ({"lam": torch.tensor(1)}, TypeError, "lam.*int64"),
    ({"lam": torch.tensor(1.0, device="meta")}, ValueError, "lam.*cpu.*meta"),
    ({"input": [1.0]}, TypeError, "input.*tensor.*list"),
    ({"input": torch.zeros(N, D, dtype=torch.int32)}, TypeError, "input.*float32.*int32"),
    ({"input": torch.zeros(N, D, dtype=torch.complex64)}, TypeError, "input.*complex64"),
    ({"input": torch.ones(N, D).to_sparse()}, TypeError, "input.*dense.*sparse_coo"),
    ({"input": torch.zeros(2, N, D)}, ValueError, r"input.*\(N, D\).*\(2, 4, 3\)"),
    ({"input": torch.tensor(1.0)}, ValueError, r"input.*\(N, D\)"),
    ({"input": torch.zeros(N, D + 1)}, ValueError, r"input.*D = 3.*\(5, 3\).*\(4, 4\)"),
    ({"linear_weight": torch.zeros(D)}, ValueError, r"linear_weight.*\(C, D\)"),
    ({"linear_weight": torch.zeros(0, D)}, ValueError, "linear_weight.*C >= 1"),
    ({"linear_weight": torch.zeros(C, D).double()}, TypeError, "linear_weight.*float32.*float64"),
    ({"linear_weight": torch.zeros(C, D, device="meta")}, ValueError, "linear_weight.*meta"),
    ({"target": torch.zeros(N)}, TypeError, "target.*int64.*float32"),
    ({"target": torch.zeros(N, dtype=torch.int32)}, TypeError, "target.*int64.*int32.*long"),
    ({"target": torch.zeros(N + 1).long()}, ValueError, r"target.*\(4,\).*\(5,\)"),
    ({"target": torch.zeros(N, 1).long()}, ValueError, "target"),
    ({"target": [0] * N}, TypeError, "target.*list"),
    ({"target": torch.zeros(N, device="meta").long()}, ValueError, "target.*meta"),
]
LOSS_ONLY = [
    ({"reduction": "average"}, ValueError, "reduction.*mean.*average"),
    ({"reduction": None}, ValueError, "reduction.*None"),
    ({"reduction": []}, ValueError, r"reduction.*\[\]"),
    ({"ignore_index": 2**63}, ValueError, "ignore_index.*64 bits.*9223372036854775808"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing.*\[0, 1\].*1.5"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing.*nan"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing.*str"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index.*float"),
    ({"weight": [1.0] * C}, TypeError, "weight.*list"),
    ({"weight": torch.ones(C).long()}, TypeError, "weight.*int64"),
    ({"weight": torch.ones(C + 1)}, ValueError, r"weight.*\(5,\).*\(6,\)"),
    ({"weight": torch.ones(C, device="meta")}, ValueError, "weight.*meta"),
]


def names(case: object) -> str:
    return "-".join(case) if isinstance(case, dict) else ""


def refuses(function: Callable, wrong: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        function(**{**arguments(), **wrong})
    assert torch.isfinite(function(**arguments())).all()


@pytest.mark.parametrize(("wrong", "error", "text"), BOTH + LOSS_ONLY, ids=names)
def test_loss(wrong: dict, error: type, text: str) -> None:
    refuses(functional.lsoftmax_loss, wrong, error, text)


@pytest.mark.parametrize(("wrong", "error", "text"), BOTH, ids=names)
def test_linear(wrong: dict, error: type, text: str) -> None:
    refuses(functional.lsoftmax_linear, wrong, error, text)


@pytest.mark.parametrize("target", [C, -1, 2**40, -(2**40)])
@pytest.mark.parametrize("function", [functional.lsoftmax_loss, functional.lsoftmax_linear])
def test_target_out_of_range(function: Callable, target: int, device: str, backend: str) -> None:
    """IndexError on a CPU, as F.cross_entropy; kernels assert on the device, before any access."""
    if backend == "cuda":
        pytest.skip("a device assertion ends the process's CUDA context: see the next test")
    p = problem(N, D, C, torch.float32)
    bad = torch.tensor([0, 1, target, 2])
    error, text = (
        (IndexError, rf"target {target}.*< {C}")
        if backend == "portable"
        else (RuntimeError, "assert")
    )
    with pytest.raises(error, match=text):
        function(p.x, p.w, bad)
    assert torch.isfinite(function(p.x, p.w, p.y)).all()


def test_target_out_of_range_asserts_on_the_gpu(backend: str, device: str) -> None:
    if backend != "cuda":
        pytest.skip("needs a GPU")
    import subprocess
    import sys

    code = (
        "import torch; from lsoftmax.functional import lsoftmax_loss as f; "
        "x = torch.randn(4, 3, device='cuda'); w = torch.randn(5, 3, device='cuda'); "
        "f(x, w, torch.tensor([0, 1, 5, 2], device='cuda')); torch.cuda.synchronize()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "device-side assert" in run.stderr


def test_one_class_smaller_than_the_last_target_is_no_ignore_index() -> None:
    p = problem(N, D, C, torch.float32)
    with pytest.raises(IndexError):
        functional.lsoftmax_loss(p.x, p.w, torch.tensor([0, -100, 5, 1]))
    with pytest.raises(IndexError):  # the logits op ignores nothing
        functional.lsoftmax_linear(p.x, p.w, torch.tensor([0, -100, 4, 1]))


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"margin": 1.5}, TypeError, "margin"),
        ({"lam": -1.0}, ValueError, "lam"),
        ({"lam": "high"}, TypeError, "lam"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing"),
        ({"weight": torch.ones(3)}, ValueError, "weight"),
        ({"ignore_index": "0"}, TypeError, "ignore_index"),
        ({"bias": True}, ValueError, "bias: expected False, got True"),
        ({"dtype": torch.complex64}, TypeError, "dtype.*float32.*complex64"),
    ],
    ids=names,
)
def test_loss_module(wrong: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        lsoftmax.LSoftmaxLoss(D, C, **wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"margin": 0}, ValueError, "margin"),
        ({"lam": math.nan}, ValueError, "lam"),
        ({"bias": True}, ValueError, "bias"),
    ],
    ids=names,
)
def test_linear_module(wrong: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        lsoftmax.LSoftmaxLinear(D, C, **wrong)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError)])
@pytest.mark.parametrize("layer", [lsoftmax.LSoftmaxLoss, lsoftmax.LSoftmaxLinear])
def test_sizes_of_modules(layer: type, size: float, error: type) -> None:
    with pytest.raises(error, match=r"in_features.*integer >= 1.*got"):
        layer(size, C)
    with pytest.raises(error, match=r"(num_classes|out_features).*integer >= 1.*got"):
        layer(D, size)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"input": [1.0]}, TypeError, "input.*tensor.*list"),
        ({"input": torch.tensor(1.0)}, ValueError, r"input.*\(N, D\)"),
        ({"linear_weight": torch.zeros(C, D + 1)}, ValueError, "linear_weight"),
        ({"reduction": "max"}, ValueError, "reduction.*max"),
        ({"memory_budget": -1}, ValueError, "memory_budget.*-1"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing.*2.0"),
    ],
    ids=names,
)
def test_plan(wrong: dict, error: type, text: str) -> None:
    right = {name: arguments()[name] for name in ("input", "linear_weight")}
    with pytest.raises(error, match=text):
        functional.plan(**{**right, **wrong})


def test_diagnostics() -> None:
    with pytest.raises(TypeError, match=r"stats.*MarginStats.*dict"):
        lsoftmax.collapse_warning({})
    with pytest.raises(IndexError, match=rf"target {C}.*< {C}"):
        lsoftmax.margin_stats(torch.randn(N, D), torch.randn(C, D), torch.full((N,), C))


def test_a_refused_forward_is_no_training_step() -> None:
    head = lsoftmax.LSoftmaxLoss(D, C)
    with pytest.raises(ValueError, match="target"):
        head(torch.randn(N, D), torch.zeros(N + 1).long())
    with pytest.raises(IndexError):
        head(torch.randn(N, D), torch.full((N,), C))
    assert head.schedule.steps == 0
    assert head.lam == head.schedule.base


def test_schedule() -> None:
    for wrong in ({"base": -1.0}, {"gamma": math.nan}, {"power": math.inf}, {"minimum": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lsoftmax.LambdaSchedule(**{"base": 1.0, "gamma": 1.0, "power": 1.0, **wrong})
    with pytest.raises(TypeError, match=r"base.*str"):
        lsoftmax.LambdaSchedule("10", 1.0, 1.0)
    with pytest.raises(ValueError, match=r"base.*float32.*1e\+39"):
        lsoftmax.LambdaSchedule(1e39, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"total_steps.*64 bits"):
        lsoftmax.LambdaSchedule.for_steps(10**400)


def test_devices_without_float64_are_named() -> None:
    with FakeTensorMode():
        wrong = {name: torch.empty_like(a, device="mps") for name, a in arguments().items()}
        with pytest.raises(ValueError, match=r"got mps.*no float64.*on the CPU"):
            functional.lsoftmax_loss(**wrong)


def test_a_sharded_parameter_is_named() -> None:
    """As where the head's linear was given to fully_shard by itself."""

    class Sharded(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            return self

    wrong = {**arguments(), "linear_weight": torch.randn(C, D).as_subclass(Sharded)}
    with pytest.raises(TypeError, match=r"linear_weight: .* got a DTensor: fully_shard a module"):
        functional.lsoftmax_loss(**wrong)


def test_psi() -> None:
    with pytest.raises(TypeError, match=r"cos_theta.*list"):
        functional.psi([0.5], 2)
    with pytest.raises(TypeError, match=r"cos_theta.*int64"):
        functional.psi(torch.tensor([1]), 2)
    with pytest.raises(ValueError, match="margin"):
        functional.psi(torch.tensor([0.5]), 0)


def test_the_engine_checks_for_itself(device: str, backend: str) -> None:
    """The ops can be called past the functions' checks: no kernel may read outside its tensors."""
    if backend == "portable":
        pytest.skip("torch checks there")
    x, w = torch.randn(N, D).to(device), torch.randn(C, D).to(device)
    y, lam = torch.zeros(N).long().to(device), torch.tensor(0.0, device=device)

    def run(x=x, w=w, y=y, margin=4, lam=lam, weight=None):
        return torch.ops.lsoftmax.loss_fwd(x, w, y, margin, lam, weight, 1, -100, 0.0, True, 0)

    run()
    wrong = [
        {"x": x[0]}, {"x": x[:, :2]}, {"x": x.double()}, {"x": x.long(), "w": w.long()},
        {"w": w[:0]}, {"w": w[0]}, {"y": y[:2]}, {"y": y.int()}, {"margin": 0},
        {"lam": lam.double()}, {"lam": y}, {"weight": torch.ones(C - 1, device=device)},
    ]  # fmt: skip
    for case in wrong:
        with pytest.raises(RuntimeError, match="expected"):
            run(**case)
    _, e, rows, divisor, _ = run()
    grad = torch.tensor(1.0, device=device)
    wrong = [{"e": e[:2]}, {"rows": rows[:3]}, {"grad": grad.double()}, {"grad": grad.expand(2)}]
    for changed in wrong:
        parts = {"grad": grad, "e": e, "rows": rows, **changed}
        saved = (x, w, y, None, parts["e"], parts["rows"], divisor)
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.lsoftmax.loss_bwd(parts["grad"], *saved, -100, 0.0, 0, True, True)


def test_numbers_of_numpy_are_numbers() -> None:
    """In layers as Python's own, which torch.compile knows."""
    options = {"ignore_index": 1, "label_smoothing": 0.25, "memory_budget": 10**9}
    of_numpy = {"ignore_index": np.int64(1), "label_smoothing": np.float32(0.25)}
    of_numpy["memory_budget"] = np.int32(10**9)
    x, w, y = torch.randn(N, D), torch.randn(C, D), torch.randint(C, (N,))
    loss = lsoftmax.functional.lsoftmax_loss(x, w, y, np.int8(3), np.float64(0.5), **of_numpy)
    assert loss == lsoftmax.functional.lsoftmax_loss(x, w, y, 3, 0.5, **options)
    bytes_of_one = np.uint8(200), 200  # small for what is counted in its type
    small, same = (lsoftmax.functional.plan(x, w, memory_budget=b) for b in bytes_of_one)
    assert small == same
    assert {type(number) for number in small} == {int}
    curve = lsoftmax.LambdaSchedule(np.float32(9), np.float64(0.5), np.int64(2), keep=np.float16(0))
    layer = lsoftmax.LSoftmaxLoss(np.int64(D), np.int64(C), np.int64(3), lam=curve, **of_numpy)
    for name, value in options.items():
        assert getattr(layer, name) == value
        assert type(getattr(layer, name)) is type(value)
    assert lsoftmax.LSoftmaxLoss(D, C, lam=np.float32(0.5)).lam == 0.5


@pytest.mark.parametrize("name", ["weight", "lam"])
def test_a_gradient_that_there_is_none_of(name: str) -> None:
    """Red if it comes back as None; without gradients, and detached, the same tensor will do."""
    inputs = arguments()
    wanted = torch.rand((C,) if name == "weight" else ()).requires_grad_()

    def loss(tensor: torch.Tensor) -> torch.Tensor:
        return functional.lsoftmax_loss(**inputs, **{name: tensor})

    with pytest.raises(RuntimeError, match=rf"{name}: expected.*got one.*{name}.detach"):
        loss(wanted)
    with torch.no_grad():
        assert loss(wanted) == loss(wanted.detach())
