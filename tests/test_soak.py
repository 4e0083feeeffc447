"""Ten thousand training steps in one process: memory stays flat, and nothing is lost on the way."""

from __future__ import annotations

import gc
import io
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import lsoftmax

STEPS, WARM = 10_000, 2_000
ROOM = 8 << 20  # bytes that the process may grow by after the first steps

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("one_thread")]


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the process's memory is read from /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def test_soak(device: str, backend: str, request: pytest.FixtureRequest) -> None:
    """Batches of all sizes, autocast on and off, every way, evaluation and checkpoints between."""
    if backend in ("emulation", "sanitized"):
        pytest.skip("hours on an emulated GPU")
    draw = random.Random(request.config.getoption("--seed"))
    body = nn.Sequential(nn.Linear(20, 16), nn.Tanh()).to(device)
    head = lsoftmax.LSoftmaxLoss(16, 50).to(device)
    x = torch.randn(512, 20, device=device)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.02, momentum=0.9)
    taken, first, reserved = 0, 0, 0
    for step in range(STEPS):
        rows = torch.randint(512, (draw.choice((1, 7, 32, 64)),), device=device)
        head.memory_budget = draw.choice((None, None, 4000))
        head.reduction = draw.choice(("mean", "none"))
        with torch.autocast(device, torch.bfloat16, enabled=draw.random() < 0.3):
            loss = head(body(x[rows]), y[rows]).mean()
        taken += 1
        optimizer.zero_grad(set_to_none=draw.random() < 0.5)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            head.eval()
            before = head.lam.clone()
            with torch.no_grad():
                head(body(x), y)
                head.margin_stats(body(x), y)
            assert torch.equal(before, head.lam), "evaluation has advanced the schedule"
            head.train()
        if step % 500 == 0:
            file = io.BytesIO()
            state = {"body": body.state_dict(), "head": head.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            head = lsoftmax.LSoftmaxLoss(16, 50).to(device)  # another, as in a new process
            optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.02)
            for part, saved in ((body, "body"), (head, "head"), (optimizer, "optimizer")):
                part.load_state_dict(state[saved])
        if step == WARM:
            first = resident()
            reserved = torch.cuda.memory_allocated() if device == "cuda" else 0
    grown = resident() - first
    print(f"grown by {grown / 2**20:.2f} MB in {STEPS - WARM} steps, from {first / 2**20:.0f} MB")
    assert grown <= ROOM
    if device == "cuda":
        del loss
        assert torch.cuda.memory_allocated() <= reserved + (1 << 20)
    assert head.schedule.steps == taken == STEPS
    assert all(p.isfinite().all() for p in [*body.parameters(), *head.parameters()])
    head.eval()
    with torch.no_grad():
        predicted = head.linear(body(x)).argmax(1)
    assert (predicted == y).double().mean() > 0.9, "it has learned the four quadrants"
