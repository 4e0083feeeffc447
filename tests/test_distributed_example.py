"""examples/distributed.py: a process that is killed, what it leaves, and the same result after."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

import lsoftmax

pytest.importorskip("sklearn", reason="the example needs scikit-learn")
pytest.importorskip("tqdm", reason="the example needs tqdm")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "distributed.py"


def start(rank: int, port: int, options: list[str]) -> subprocess.Popen[str]:
    """What torchrun starts."""
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *options],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launched(*options: str) -> subprocess.CompletedProcess[str]:
    """Two processes, to their end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(SCRIPT), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def folder_of(checkpoints: Path, epochs: int, seed: int = 0) -> Path:
    return checkpoints / f"epochs-{epochs}-seed-{seed}-images-1297x1x8x8"


def finish(checkpoints: Path, epochs: int, *options: str) -> float:
    """Goes on from what is there to the end, which must be that of one process: its test error."""
    done = launched("--epochs", str(epochs), "--checkpoints", str(checkpoints), *options)
    assert done.returncode == 0, done.stderr
    together, alone = re.findall(r"process(?:es)?: test error (\S+)%", done.stdout)
    assert together == alone
    assert float(done.stdout.split("element of W:")[1]) < 1e-4
    names = [path.name for path in sorted(folder_of(checkpoints, epochs).iterdir())]
    assert names == [f"epoch-{epoch:04}" for epoch in (epochs - 1, epochs)]
    return float(alone)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_two_processes_end_as_one(tmp_path: Path) -> None:
    assert finish(tmp_path, 3) < 50
    first = sorted(folder_of(tmp_path, 3).rglob("*"))
    other = launched("--epochs", "1", "--seed", "1", "--checkpoints", str(tmp_path))
    assert other.returncode == 0, other.stderr
    assert [p.name for p in folder_of(tmp_path, 1, 1).iterdir()] == ["epoch-0001"]
    assert sorted(folder_of(tmp_path, 3).rglob("*")) == first


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_killed_then_resumed_then_the_same_as_one_process(tmp_path: Path) -> None:
    """Red if the survivor hangs or ends well, a checkpoint is not whole, or a training that goes on
    from it ends elsewhere than one that was never interrupted, in a single process.
    """
    options = ["--timeout", "60"]
    port, started = free_port(), ["--epochs", "20", "--checkpoints", str(tmp_path), *options]
    first, second = (start(rank, port, started) for rank in range(2))
    folder = folder_of(tmp_path, 20)
    while not (folder / "epoch-0003").exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    second.kill()
    second.communicate()
    error = first.communicate(timeout=60)[1]
    assert first.returncode != 0
    assert "Connection closed by peer" in error or "Connection reset" in error

    last = sorted(folder.glob("epoch-*"))[-1]
    assert last.name < "epoch-0020", "it was killed too late"
    head = lsoftmax.LSoftmaxLoss(16, 10, lam=lsoftmax.LambdaSchedule.for_steps(200))
    state = {f"criterion.{key}": value for key, value in head.state_dict().items()}
    dcp.load({"model": state}, checkpoint_id=last)
    epoch = int(last.name.removeprefix("epoch-"))
    assert state["criterion.schedule.steps"] == 10 * epoch
    (folder / ".epoch-0099").mkdir()  # as one that was killed while it saved would leave it

    assert finish(tmp_path, 20, *options) < 6


def test_started_without_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"]([])
    assert "torchrun --standalone --nproc-per-node 2" in capsys.readouterr().err
