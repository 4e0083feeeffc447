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


def finish(checkpoints: Path, epochs: int, *options: str) -> float:
    """Goes on from what is there to the end, which must be that of one process: its test error."""
    done = launched("--epochs", str(epochs), *options)
    assert done.returncode == 0, done.stderr
    together, alone = re.findall(r"process(?:es)?: test error (\S+)%", done.stdout)
    assert together == alone
    assert float(done.stdout.split("element of W:")[1]) < 1e-4
    names = [path.name for path in sorted(checkpoints.iterdir())]
    assert names == [*(f"epoch-{epoch:04}" for epoch in (epochs - 1, epochs)), "settings.json"]
    return float(alone)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_two_processes_end_as_one(tmp_path: Path) -> None:
    assert finish(tmp_path, 3, "--checkpoints", str(tmp_path)) < 50
    other = launched("--epochs", "3", "--seed", "1", "--checkpoints", str(tmp_path))
    assert other.returncode != 0
    assert "has checkpoints of {'epochs': 3, 'seed': 0" in other.stderr
    assert not other.stdout
    (tmp_path / "settings.json").unlink()
    other = launched("--epochs", "3", "--checkpoints", str(tmp_path))
    assert "has checkpoints of nobody knows what" in other.stderr


def test_settings_without_a_checkpoint_bind_nobody(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    assert finish(tmp_path, 2, "--checkpoints", str(tmp_path)) < 90


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_killed_then_resumed_then_the_same_as_one_process(tmp_path: Path) -> None:
    """Red if the survivor hangs or ends well, a checkpoint is not whole, or a training that goes on
    from it ends elsewhere than one that was never interrupted, in a single process.
    """
    options = ["--timeout", "60", "--checkpoints", str(tmp_path)]
    port = free_port()
    first, second = (start(rank, port, ["--epochs", "20", *options]) for rank in range(2))
    while not list(tmp_path.glob("epoch-0003")):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    second.kill()
    second.communicate()
    error = first.communicate(timeout=60)[1]
    assert first.returncode != 0
    assert "Connection closed by peer" in error or "Connection reset" in error

    last = sorted(tmp_path.glob("epoch-*"))[-1]
    assert last.name < "epoch-0020", "it was killed too late"
    head = lsoftmax.LSoftmaxLoss(16, 10, lam=lsoftmax.LambdaSchedule.for_steps(200))
    state = {f"criterion.{key}": value for key, value in head.state_dict().items()}
    dcp.load({"model": state}, checkpoint_id=last)
    epoch = int(last.name.removeprefix("epoch-"))
    assert state["criterion.schedule.steps"] == 10 * epoch
    (tmp_path / ".epoch-0099").mkdir()  # as one that was killed while it saved would leave it

    assert finish(tmp_path, 20, *options) < 6


def test_started_without_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"]([])
    assert "torchrun --standalone --nproc-per-node 2" in capsys.readouterr().err
