"""torch.func: gradients, batches of models, second derivatives, and what cannot be transformed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from lsoftmax import LSoftmaxLoss, functional
from problems import Problem, problem

FUNCTIONS = (functional.lsoftmax_loss, functional.lsoftmax_linear)


@pytest.fixture
def p(device: str) -> Problem:
    return problem(7, 4, 6, torch.float64, device)


def plain(p: Problem) -> tuple[Tensor, Tensor]:
    return p.x.detach(), p.w.detach()


def assert_close(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_grad_is_backward(function, p: Problem) -> None:
    x, w = plain(p)
    dx, dw = grad(lambda x, w: function(x, w, p.y, 3, 0.5).square().sum(), argnums=(0, 1))(x, w)
    truth = torch.autograd.grad(function(p.x, p.w, p.y, 3, 0.5).square().sum(), (p.x, p.w))
    assert_close(dx, truth[0])
    assert_close(dw, truth[1])


def test_lam_has_a_gradient_under_a_transform(p: Problem) -> None:
    """Red if it is 0: without a transform it is refused."""

    def loss(lam: Tensor) -> Tensor:
        return functional.lsoftmax_loss(p.x.detach(), p.w.detach(), p.y, 3, lam)

    lam = torch.tensor(0.7, device=p.x.device)
    found, step = grad(loss)(lam), 1e-3
    assert found != 0
    slope = (loss(lam + step) - loss(lam - step)) / (2 * step)
    torch.testing.assert_close(found.double(), slope.double(), rtol=1e-2, atol=0)


def test_gradients_per_sample(p: Problem) -> None:
    x, w = plain(p)
    one = grad(lambda w, x, y: functional.lsoftmax_loss(x, w, y, 4, 0.5))
    together = vmap(one, (None, 0, 0))(w, x, p.y)
    for i in range(len(p.y)):
        loss = functional.lsoftmax_loss(p.x[i], p.w, p.y[i], 4, 0.5)
        assert_close(together[i], torch.autograd.grad(loss, p.w)[0])


def test_many_models_at_once(p: Problem) -> None:
    """Options in there too: a transform must not lose them."""
    x, w = plain(p)
    weights = torch.stack([w, 2 * w, -w])
    p.y[0] = -1
    options = {
        "weight": torch.rand(6).double().to(x.device),
        "ignore_index": -1,
        "label_smoothing": 0.1,
        "reduction": "sum",
    }
    losses = vmap(lambda w: functional.lsoftmax_loss(x, w, p.y, 3, 0.5, **options))(weights)
    truth = [functional.lsoftmax_loss(x, each, p.y, 3, 0.5, **options) for each in weights]
    assert_close(losses, torch.stack(truth))


def test_forward_mode_and_second_derivatives(p: Problem) -> None:
    """Against finite differences of the op: a tangent of 0 was silent once."""
    x, w = plain(p)
    direction, step = torch.randn_like(w), 1e-6

    def loss(w: Tensor) -> Tensor:
        return functional.lsoftmax_loss(x, w, p.y, 2, 0.5)

    _, tangent = jvp(loss, (w,), (direction,))
    differences = (loss(w + step * direction) - loss(w - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, differences, rtol=1e-6, atol=1e-8)

    def gradient(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(functional.lsoftmax_loss(x, at, p.y, 2, 0.5), at)[0]

    second = torch.einsum("ijkl,kl->ij", hessian(loss)(w), direction)
    differences = (gradient(w + step * direction) - gradient(w - step * direction)) / (2 * step)
    torch.testing.assert_close(second, differences, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_transforms(function, p: Problem) -> None:
    """Gradients of 0, silently, once."""
    x, w = plain(p)

    def loss(w: Tensor) -> Tensor:
        return function(x, w, p.y, 3, 0.5).square().sum()

    torch._dynamo.reset()
    for transformed in (grad(loss), lambda w: jvp(loss, (w,), (w,))[1]):
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        assert_close(compiled(w), transformed(w))


def test_a_layer_with_a_constant_lam(device: str) -> None:
    head = LSoftmaxLoss(6, 5, lam=0.5).to(device)
    x, y = torch.randn(8, 6, device=device), torch.randint(5, (8,), device=device)
    parameters = dict(head.named_parameters())
    gradients = grad(lambda each: functional_call(head, each, (x, y)))(parameters)
    head(x, y).backward()
    torch.testing.assert_close(gradients["linear.weight"], head.linear.weight.grad)


def test_a_layer_that_anneals_says_that_it_changes_itself(device: str) -> None:
    """As batch normalisation does: in eval mode it changes nothing."""
    head = LSoftmaxLoss(6, 5).to(device)
    x, y = torch.randn(8, 6, device=device), torch.randint(5, (8,), device=device)
    parameters = dict(head.named_parameters())
    run = grad(lambda each: functional_call(head, each, (x, y)))
    with pytest.raises(RuntimeError, match="call eval"):
        run(parameters)
    assert head.schedule.steps == 0
    head.eval()
    truth = functional.lsoftmax_loss(x, head.linear.weight, y, 4, head.lam)
    truth.backward()
    torch.testing.assert_close(run(parameters)["linear.weight"], head.linear.weight.grad)


@pytest.mark.parametrize("wrap", ["weight_norm", "orthogonal"])
def test_reparametrised_class_vectors(wrap: str, device: str) -> None:
    """torch.nn.utils.parametrizations: what is trained lies behind the weight."""
    head = LSoftmaxLoss(8, 5, margin=3, lam=0.5).to(device)
    getattr(nn.utils.parametrizations, wrap)(head.linear)
    x, y = torch.randn(8, 8, device=device), torch.randint(5, (8,), device=device)
    weight = head.linear.weight
    parameters = list(head.parameters())
    ours = torch.autograd.grad(head(x, y), parameters)
    truth = torch.autograd.grad(functional.lsoftmax_loss(x, weight, y, 3, 0.5), parameters)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()
