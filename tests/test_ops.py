"""The ops as torch sees them: opcheck, torch.compile, autocast, and the warning without kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import lsoftmax
from lsoftmax import functional
from lsoftmax.margin import accumulate_type
from problems import problem, relative_error


def samples(
    name: str, device: str, dtypes: Sequence[torch.dtype], n: int = 6, by_column: bool = False
) -> list[tuple]:
    """Arguments of every op; ``by_column``: of matrices that lie in memory column by column."""
    out = []
    for dtype in dtypes:
        p = problem(n, 5, 9, dtype, device)
        x, w = p.x.detach(), p.w.detach()
        if by_column:
            x, w = (matrix.t().contiguous().t() for matrix in (x, w))
        lam = torch.tensor(0.5, device=device)
        weight = torch.rand(9, dtype=accumulate_type(dtype)).to(device)
        for reduction, smoothing, save, chunk in (
            (0, 0.0, True, 0),
            (0, 0.1, True, 4),
            (1, 0.1, True, 0),
            (2, 0.1, False, 0),
            (1, 0.0, False, 4),
        ):
            options = (3, lam, weight, reduction, -100, smoothing)
            fwd = (x, w, p.y, *options, save, chunk)
            if name == "loss_fwd":
                out.append(fwd)
            for needs in ((True, True), (True, False), (False, True)):
                if name == "loss_bwd" and save:
                    loss, *saved, _ = torch.ops.lsoftmax.loss_fwd(*fwd)
                    grad = torch.randn_like(loss)
                    saved = (grad, x, w, p.y, weight, *saved, -100, smoothing, chunk)
                    out.append((*saved, *needs))
                if name == "loss_and_gradients" and reduction != 0:
                    out.append((x, w, p.y, *options, 4, *needs))
        if name == "linear_fwd":
            out.append((x, w, p.y, 3, lam))
        if name == "linear_bwd":
            logits, coefficients, _ = torch.ops.lsoftmax.linear_fwd(x, w, p.y, 3, lam)
            grad = torch.randn_like(logits)
            out.append((grad, x, w, p.y, coefficients, True, True))
    return out


OPS = ("loss_fwd", "loss_bwd", "loss_and_gradients", "linear_fwd", "linear_bwd")


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, device: str, backend: str) -> None:
    """Schema, fake shapes, types, strides and functionalization, by torch's own checker, in every
    storage type; emulated, where each sample takes a second, in the two that differ most.
    """
    op = getattr(torch.ops.lsoftmax, name).default
    dtypes = (torch.float32, torch.bfloat16)
    if backend in ("portable", "cuda"):
        dtypes += (torch.float64, torch.float16)
    for args in samples(name, device, dtypes):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("n", [0, 6])
@pytest.mark.parametrize("name", OPS)
def test_fakes_of_matrices_that_lie_by_column(name: str, n: int, device: str) -> None:
    """Red if a gradient lies as its matrix does, where its fake, and what is compiled, say not."""
    op = getattr(torch.ops.lsoftmax, name).default
    for args in samples(name, device, (torch.float32,), n, by_column=True):
        torch.library.opcheck(op, args, test_utils="test_faketensor")


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), head

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu(), y)


@pytest.mark.parametrize("layer", [lsoftmax.LSoftmaxLoss, lsoftmax.LSoftmaxLinear])
def test_compile_fullgraph(layer: type, device: str) -> None:
    """No graph break, the eager numbers, and annealing goes on without a recompile."""
    torch._dynamo.reset()
    eager = Model(layer(8, 10, margin=4)).to(device)
    other = Model(layer(8, 10, margin=4)).to(device)
    other.load_state_dict(eager.state_dict())
    recompiles = torch._dynamo.config.patch(error_on_recompile=True)
    with recompiles:
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            x, y = torch.randn(5, 6).to(device), torch.randint(10, (5,)).to(device)
            ours, theirs = compiled(x, y), eager(x, y)
            torch.testing.assert_close(ours, theirs)
            upstream = torch.randn_like(theirs)
            for model, out in ((other, ours), (eager, theirs)):
                model.zero_grad()
                out.backward(upstream)
            for a, b in zip(other.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)
    assert other.head.schedule.steps == 3
    assert torch.equal(other.head.lam, eager.head.lam)


def test_compile_with_inductor(device: str) -> None:
    torch._dynamo.reset()
    model = Model(lsoftmax.LSoftmaxLoss(8, 10)).to(device)
    x, y = torch.randn(5, 6).to(device), torch.randint(10, (5,)).to(device)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generated code's compiler has its own
        loss = torch.compile(model, fullgraph=True)(x, y)
        loss.backward()
    gradient = model.head.linear.weight.grad.clone()
    model.zero_grad()
    model.load_state_dict(state)
    expected = model(x, y)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, model.head.linear.weight.grad)


def test_autocast(device: str) -> None:
    """Products in the autocast type, loss in float32, gradients in the parameters' type."""
    p = problem(32, 24, 50, torch.float32, device)
    kind = torch.device(device).type
    with torch.autocast(kind, dtype=torch.bfloat16):
        loss = functional.lsoftmax_loss(p.x, p.w, p.y, 4, 1.0)
        logits = functional.lsoftmax_linear(p.x, p.w, p.y, 4, 1.0)
    assert loss.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    dx, dw = torch.autograd.grad(loss, (p.x, p.w))
    assert dx.dtype == dw.dtype == torch.float32
    narrow = functional.lsoftmax_loss(p.x.bfloat16(), p.w.bfloat16(), p.y, 4, 1.0)
    assert torch.equal(loss, narrow), "autocast must not cast again inside"
    truth = torch.autograd.grad(
        functional.lsoftmax_loss(p.x.double(), p.w.double(), p.y, 4, 1.0), (p.x, p.w)
    )
    assert relative_error(dx, truth[0]) < 2e-2
    assert relative_error(dw, truth[1]) < 2e-2
    with torch.autocast(kind, dtype=torch.bfloat16):
        wide = problem(4, 3, 5, torch.float64, device)
        assert functional.lsoftmax_loss(wide.x, wide.w, wide.y).dtype == torch.float64
        mixed = functional.lsoftmax_loss(p.x.bfloat16(), p.w, p.y)  # a bf16 body, a float32 head
    assert mixed.dtype == torch.float32


def test_backward_under_autocast_is_the_same(device: str) -> None:
    p = problem(8, 6, 7, torch.float32, device)
    loss = functional.lsoftmax_loss(p.x, p.w, p.y)
    expected = torch.autograd.grad(loss, (p.x, p.w), retain_graph=True)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss, (p.x, p.w))
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def test_kernels_serve_the_ops(device: str, backend: str) -> None:
    """Which implementation ran, by the dispatcher's word: else every other test proves nothing."""
    key = {"cuda": "CUDA"}.get(backend, "CPU")
    has = torch._C._dispatch_has_kernel_for_dispatch_key("lsoftmax::loss_fwd", key)
    assert has == (backend != "portable")
