"""The specification itself: against the paper's definition and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from lsoftmax import functional, reference
from problems import problem


@pytest.mark.parametrize("margin", range(1, 9))
def test_psi_is_the_papers_definition(margin: int) -> None:
    theta = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    k = torch.clamp((theta * margin / math.pi).floor(), max=margin - 1)
    papers = (-1.0) ** k * torch.cos(margin * theta) - 2 * k
    torch.testing.assert_close(reference.psi(theta.cos(), margin), papers, atol=1e-11, rtol=0)


@pytest.mark.parametrize("margin", range(1, 9))
def test_psi_decreases_and_is_continuous_at_the_bucket_edges(margin: int) -> None:
    edges = torch.tensor([math.cos(j * math.pi / margin) for j in range(1, margin)]).double()
    step = 1e-9
    gap = reference.psi(edges + step, margin) - reference.psi(edges - step, margin)
    assert (gap.abs() < 1e-7).all()
    values = reference.psi(torch.linspace(-1, 1, 4001, dtype=torch.float64), margin)
    assert (values.diff() > -1e-12).all(), "psi must grow with the cosine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("margin", [65, 300, 1000])
def test_psi_is_rounded_once(margin: int, dtype: torch.dtype) -> None:
    """Red if k, the recurrence or the edges are of the cosine's type: bfloat16 counts to 256."""
    cosine = torch.cat([torch.rand(1000) * 2 - 1, torch.tensor([-1.0, 0.5, 1.0])]).to(dtype)
    theta = cosine.double().acos()
    k = torch.clamp((theta * margin / math.pi).floor(), max=margin - 1)
    papers = (-1.0) ** k * torch.cos(margin * theta) - 2 * k
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-8}
    torch.testing.assert_close(functional.psi(cosine, margin), papers.to(dtype), **rounding)


def away_from_edges(p, margin: int) -> bool:
    cos = torch.cosine_similarity(p.x, p.w[p.y])
    edges = torch.tensor([math.cos(j * math.pi / margin) for j in range(1, margin)]).double()
    return not len(edges) or bool(((cos[:, None] - edges).abs() > 1e-3).all())


@pytest.mark.parametrize("margin", range(1, 9))
def test_gradcheck_and_gradgradcheck(margin: int) -> None:
    p = problem(4, 3, 5)
    while not away_from_edges(p, margin):
        p = problem(4, 3, 5)
    for function in (reference.lsoftmax_loss, reference.lsoftmax_linear):

        def run(x, w, function=function):
            return function(x, w, p.y, margin, 0.3)

        assert torch.autograd.gradcheck(run, (p.x, p.w))
        assert torch.autograd.gradgradcheck(run, (p.x, p.w))


def test_no_other_logit_changes() -> None:
    p = problem(7, 5, 6, torch.float32)
    logits = reference.lsoftmax_linear(p.x, p.w, p.y, 3, 0.5)
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, p.y[:, None], False)
    assert torch.equal(logits[others], (p.x @ p.w.t())[others])
