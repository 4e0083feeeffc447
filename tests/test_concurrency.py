"""The same bits as alone: in threads, beside other models, on CUDA streams, and a hundred times."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lsoftmax
from cases import WAYS, on_the_way
from lsoftmax import functional
from problems import Problem, nearest, problem
from test_loss import FLOATS

STEPS = 6


def train(seed: int, device: str, margin: int = 4) -> list[Tensor]:
    """A few steps of a small model with the default schedule: its losses and what it ends with."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator}
    head = lsoftmax.LSoftmaxLoss(12, 9, margin, label_smoothing=0.1).to(device)
    with torch.no_grad():
        head.linear.weight.copy_(torch.randn(9, 12, **draw))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(16, 12, **draw).to(device)
        y = nearest(x, head)
        optimizer.zero_grad()
        loss = head(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert head.schedule.share > 0
    return [*losses, head.linear.weight.detach(), *head.schedule.state_dict().values()]


def at_once(work: list[Callable[[], list[Tensor]]]) -> list[list[Tensor]]:
    """What each returns, run in a thread of its own, all begun together."""
    results: list[list[Tensor] | BaseException | None] = [None] * len(work)
    gate = threading.Barrier(len(work))
    cores = torch.get_num_threads()

    def run(place: int) -> None:
        try:
            # A new thread has the environment's number, and with another MKL may round otherwise.
            torch.set_num_threads(cores)
            gate.wait()
            results[place] = work[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def assert_same_bits(some: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(some, others, strict=True):
        assert torch.equal(a, b)


def test_threads_with_models_of_their_own(device: str, backend: str) -> None:
    if backend in ("emulation", "sanitized"):
        pytest.skip("the emulated GPU runs one kernel at a time, in one thread")
    alone = [train(seed, device, margin) for seed, margin in ((1, 2), (2, 4), (3, 3))]
    for _ in range(5):
        together = at_once(
            [lambda s=s, m=m: train(s, device, m) for s, m in ((1, 2), (2, 4), (3, 3))]
        )
        for some, others in zip(alone, together, strict=True):
            assert_same_bits(some, others)


def test_threads_that_share_weights(device: str, backend: str) -> None:
    """The same layer, evaluated in two threads, by each of the ways."""
    if backend in ("emulation", "sanitized"):
        pytest.skip("the emulated GPU runs one kernel at a time, in one thread")
    p = problem(40, 16, 300, torch.float32, device)

    def work(budget: int | None) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            found = []
            for _ in range(3):
                loss = functional.lsoftmax_loss(p.x, p.w, p.y, 4, 0.5, memory_budget=budget)
                found += [loss.detach(), *torch.autograd.grad(loss, (p.x, p.w))]
            return found

        return run

    jobs = [work(budget) for budget in (None, 5000, None, 5000)]
    for some, others in zip([job() for job in jobs], at_once(jobs), strict=True):
        assert_same_bits(some, others)


def test_models_taking_turns(device: str) -> None:
    """Two heads in one process, step by step: neither sees the other's schedule or weights."""
    first, second = (train(seed, device) for seed in (4, 5))
    heads = [lsoftmax.LSoftmaxLoss(12, 9, label_smoothing=0.1).to(device) for _ in range(2)]
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    losses: list[list[Tensor]] = [[], []]
    optimizers = []
    for head, generator in zip(heads, generators, strict=True):
        with torch.no_grad():
            head.linear.weight.copy_(torch.randn(9, 12, generator=generator))
        optimizers.append(torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9))
    for _ in range(STEPS):
        found = []
        for head, generator in zip(heads, generators, strict=True):
            x = torch.randn(16, 12, generator=generator).to(device)
            found.append(head(x, nearest(x, head)))
        for place, (loss, optimizer) in enumerate(zip(found, optimizers, strict=True)):
            optimizer.zero_grad()
            loss.backward()  # after both forwards
            optimizer.step()
            losses[place].append(loss.detach())
    for head, seen, alone in zip(heads, losses, (first, second), strict=True):
        ended = [head.linear.weight.detach(), *head.schedule.state_dict().values()]
        assert_same_bits([*seen, *ended], alone)


def test_two_streams(device: str, backend: str) -> None:
    if backend != "cuda":
        pytest.skip("needs a GPU")
    problems = [problem(256, 64, 5000, torch.bfloat16, device) for _ in range(2)]
    alone = [p.loss(margin=4, lam=0.5) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    together: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for place, (p, stream) in enumerate(zip(problems, streams, strict=True)):
            with torch.cuda.stream(stream):
                together[place].append(p.loss(margin=4, lam=0.5))
    torch.cuda.synchronize()
    for expected, found in zip(alone, together, strict=True):
        for values in found:
            assert_same_bits(list(expected), list(values))


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_again_and_again(dtype: torch.dtype, times: int, device: str, backend: str) -> None:
    """By each of the ways; every class many times, so that the order of sums would show."""
    sizes = (64, 33, 21) if backend in ("portable", "cuda") else (9, 9, 11)
    p = problem(*sizes, dtype, device)
    for way in WAYS:
        runs = (repeated(p, way) for _ in range(times))
        first = next(runs)
        for again in runs:
            assert_same_bits(again, first)


def repeated(p: Problem, way: str) -> list[Tensor]:
    options = {"margin": 4, "lam": 0.2, "label_smoothing": 0.1}
    with on_the_way(way, 8, p.x, p.w, "mean") as budget:
        loss, *gradients = p.loss(**options, memory_budget=budget)
    upstream = torch.ones(len(p.y), len(p.w), device=p.x.device, dtype=p.x.dtype)
    return [loss, *gradients, *p.logits(upstream, margin=3)]
