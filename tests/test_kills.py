"""Experiments killed at random moments, as a machine going down kills, end as if never killed."""
# ruff: noqa: E402

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the examples need {package}")

import mnist_run
from test_distributed_example import finish, folder_of, free_port, start
from test_experiments import write_mnist

KILLS = 20  # of examples/mnist.py
DISTRIBUTED_KILLS = 4  # of examples/distributed.py

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.config.getoption("--seed"))


def table(folder: Path) -> list[dict]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def written(folder: Path) -> list[tuple[str, int]]:
    """What is there now: changes as soon as a file is begun."""
    if not folder.exists():
        return []
    with os.scandir(folder) as entries:  # which one of them may leave on the way
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in entries)


def kill(process: multiprocessing.Process, folder: Path, draw: random.Random) -> bool:
    """At a random moment, and every other time at the next write after it; False: it ended."""
    process.join(draw.uniform(0, 4))
    if draw.random() < 0.5:
        with contextlib.suppress(FileNotFoundError):  # a temporary file has got its name
            before = written(folder)
            while process.is_alive() and written(folder) == before:
                pass
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def test_mnist(tmp_path: Path, draw: random.Random) -> None:
    """Red if a kill loses a row or a checkpoint, doubles one, or leaves half a file."""
    write_mnist(tmp_path)
    options = ["--data", str(tmp_path), "--seeds", "2", "--margins", "1", "4", "--epochs", "10"]
    options += ["--device", "cpu"]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "sklearn", "matplotlib.pyplot", "mnist_run"])

    def launch(folder: Path) -> multiprocessing.Process:
        process = server.Process(target=mnist_run.run, args=(options, str(folder)))
        process.start()
        return process

    straight = tmp_path / "straight"
    process = launch(straight)
    process.join()
    assert process.exitcode == 0
    expected = table(straight)
    assert len(expected) == 4

    kills, ended, moments = 0, 0, []
    killed = tmp_path / "killed"
    while kills < KILLS or ended == 0:
        process = launch(killed)
        if kills < KILLS and kill(process, killed, draw):
            kills += 1
            if (killed / "results.json").exists():
                rows = table(killed)  # whole
                assert rows == expected[: len(rows)]
                saved = list(killed.glob("*.pt"))
                for path in saved:
                    torch.load(path, weights_only=True)
                moments.append((len(rows), len(saved)))
            continue
        process.join()
        assert process.exitcode == 0
        assert table(killed) == expected
        shutil.rmtree(killed)
        ended += 1
    print(f"{kills} kills, at (rows, checkpoints) {moments}; {ended} trainings ended")
    assert len(set(moments)) > 1, "all kills met the same state"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed(tmp_path: Path, draw: random.Random) -> None:
    """Either of two processes, whenever: what is left can be loaded, and ends as in one process."""
    training, options = ["--epochs", "20", "--checkpoints", str(tmp_path)], ["--timeout", "60"]
    saved = folder_of(tmp_path, 20)
    seen = []
    for _ in range(DISTRIBUTED_KILLS):
        port = free_port()
        both = [start(rank, port, [*training, *options]) for rank in range(2)]
        reached = len(seen) and seen[-1]
        while True:  # until it has begun, and then some time
            names = sorted(path.name for path in saved.glob("epoch-*"))
            if names and int(names[-1][-4:]) > reached:
                break
            assert all(process.poll() is None for process in both), both[0].communicate()[1]
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        draw.choice(both).kill()
        for process in both:
            process.communicate(timeout=90)
        seen.append(int(max(path.name for path in saved.glob("epoch-*"))[-4:]))
        if seen[-1] > 16:
            break
    print(f"{len(seen)} kills, after epochs {seen}")
    finish(tmp_path, 20, *options)
