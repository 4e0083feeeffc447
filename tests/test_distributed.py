"""The class-parallel layer: everything that several processes check together, by world."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import distributed_state_checks as states
from distributed_run import assert_close, launch
from lsoftmax import LSoftmaxLoss
from lsoftmax.distributed import ClassParallelLSoftmaxLoss

EVERYWHERE = (
    "distributed_checks:initial_weights",
    "distributed_checks:options_of_the_loss",
    "distributed_checks:chunks",
    "distributed_checks:ignored_rows",
    "distributed_checks:logits_far_apart",
    "distributed_checks:targets_of_one_shard",
)
CHECKS = {
    1: (
        "distributed_checks:arguments",
        "distributed_checks:other_devices",
        "distributed_layer_checks:stats",
        *EVERYWHERE,
    ),
    2: (
        *EVERYWHERE,
        "distributed_training_checks:data_parallel",
        "distributed_training_checks:fully_sharded",
        "distributed_training_checks:compiled_under_autocast",
        "distributed_state_checks:resumed",
        "distributed_training_checks:averaged",
        "distributed_state_checks:rows_of_another",
        "distributed_traffic_checks:volume",
        "distributed_traffic_checks:dx_travels_meanwhile",
        "distributed_layer_checks:annealed",
        "distributed_layer_checks:counted_classes",
        "distributed_traffic_checks:features_once",
        "distributed_traffic_checks:sample_is_cast",
        "distributed_checks:no_rows",
        "distributed_checks:twice",
        "distributed_checks:mesh_backwards",
    ),
    3: (
        *EVERYWHERE,
        "distributed_training_checks:data_parallel",
        "distributed_training_checks:sampled",
        "distributed_state_checks:whole_state_dicts",
        "distributed_layer_checks:counted_classes",
        "distributed_layer_checks:stats",
        "distributed_traffic_checks:frozen_backbone",
        "distributed_traffic_checks:frozen_classes",
        "distributed_training_checks:clipped_by_the_largest",
        "distributed_training_checks:scaled_gradients",
        "distributed_checks:target_outside",
    ),
    4: (
        *EVERYWHERE,
        "distributed_state_checks:shard_of_a_shard",
        "distributed_layer_checks:stats",
        "distributed_traffic_checks:volume",
        "distributed_checks:mesh_dimension",
        "distributed_layer_checks:lam_of_groups",
    ),
    8: (
        *EVERYWHERE,
        "distributed_traffic_checks:volume",
        "distributed_checks:float32_and_bfloat16",
    ),
}


class Worlds:
    """Each world is run when its first check is asked for."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.results: dict[int, list[dict[str, str]]] = {}

    def assert_passed(self, size: int, check: str) -> None:
        if size not in self.results:
            self.results[size] = launch(size, CHECKS[size], self.folder, self.seed)
        found = [result.get(check, "not reached") for result in self.results[size]]
        # The process that failed first tells more than those that lost it.
        failed = [text for text in found if text != "passed" and "Connection closed" not in text]
        if set(found) != {"passed"}:
            pytest.fail("\n".join(failed or found), pytrace=False)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Worlds:
    return Worlds(tmp_path_factory.mktemp("worlds"), request.config.getoption("--seed"))


@pytest.mark.parametrize(
    ("size", "check"), [(size, check) for size, checks in CHECKS.items() for check in checks]
)
def test_processes_together(worlds: Worlds, size: int, check: str) -> None:
    worlds.assert_passed(size, check)


def test_processes_together_on_the_kernels(
    device: str, backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if backend != "emulation":
        pytest.skip("only the emulation has kernels for the CPU tensors of several processes")
    checks = (*EVERYWHERE, *(f"distributed_checks:{name}" for name in ("no_rows", "twice")))
    checks += ("distributed_checks:float32_and_bfloat16",)
    checks += ("distributed_layer_checks:counted_classes",)
    results = launch(3, checks, tmp_path, request.config.getoption("--seed"), emulated=True)
    assert results == [dict.fromkeys(checks, "passed")] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_of_its_own_is_the_layer(dtype: torch.dtype, device: str) -> None:
    """On a GPU by NCCL and the kernels of shards, which no other test meets there."""
    nccl = torch.device(device).type == "cuda"
    if nccl and not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    store = dist.HashStore()
    dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=0, world_size=1)
    try:
        options = {"margin": 3, "lam": 0.5, "label_smoothing": 0.1, "device": device}
        head = ClassParallelLSoftmaxLoss(24, 37, dtype=dtype, **options)
        layer = LSoftmaxLoss(24, 37, dtype=dtype, **options)
        head.load_state_dict(layer.state_dict())
        x, y = torch.randn(19, 24).to(device, dtype), torch.randint(37, (19,)).to(device)
        results = []
        for module, weight in ((head, head.linear.weight), (layer, layer.linear.weight)):
            rows = x.clone().requires_grad_()
            loss = module(rows, y)
            loss.backward()
            grad = weight.grad.to_local() if hasattr(weight.grad, "to_local") else weight.grad
            results.append((loss.detach(), rows.grad, grad))
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(*results, strict=True):
        assert ours.any()
        bound = 1e-5 if dtype == torch.float32 or ours.dim() == 0 else 1e-2
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound * theirs.abs().max().item())


def test_a_single_class_is_certain_without_a_word() -> None:
    """No other class: log 0, of which NumPy would warn, and a warning is an error here."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        head = ClassParallelLSoftmaxLoss(4, 1)
        x = torch.randn(5, 4, requires_grad=True)
        loss = head(x, torch.zeros(5, dtype=torch.int64))
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert loss == 0
    assert not x.grad.any()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_checkpoints_go_between_worlds(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Saved by 3 processes, by 2, by one that knows of no others, by 4: each goes on from the last,
    momentum and annealing by class too, as one process does that was never interrupted.
    """

    def go_on(size: int) -> None:
        check = "distributed_state_checks:go_on"
        results = launch(size, [check], tmp_path, request.config.getoption("--seed"))
        assert results == [{check: "passed"}] * size

    go_on(3)
    go_on(2)
    head, optimizer = states.training_of(9, plain=True)
    states.load(head, optimizer, tmp_path / "checkpoint-1")
    states.step(head, optimizer, *states.fixed_batch())
    state = states.state_of(head, optimizer)
    dcp.save(state, checkpoint_id=tmp_path / "checkpoint-2")
    go_on(4)
    states.load(head, optimizer, tmp_path / "checkpoint-3")

    truth, optimizer = states.training_of(1, plain=True)
    for _ in range(4):
        states.step(truth, optimizer, *states.fixed_batch())
    assert_close(head.linear.weight, truth.linear.weight, "weight", 1e-6)
    assert head.schedule.steps == 4
    for name, number in head.schedule.named_buffers():
        assert_close(number, getattr(truth.schedule, name), name, 1e-5)
    assert head.schedule.share > 0


@pytest.mark.parametrize("failure", ["dies", "raises", "hangs"])
def test_failure_of_a_process_ends_the_others(
    failure: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """At once where it is gone, else when the group's timeout, 4 seconds here, has passed."""
    check = f"distributed_state_checks:{failure}"
    seed = request.config.getoption("--seed")
    start = time.monotonic()
    launch(3, [check], tmp_path, seed, timeout=4)
    assert time.monotonic() - start < 45
    assert sorted(path.name for path in tmp_path.glob("survived-*")) == ["survived-0", "survived-1"]
