"""How much memory a plan may go by: of a GPU, the machine, a container; and what is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lsoftmax import memory
from lsoftmax import plan as planning
from lsoftmax.plan import choose

CPU = torch.device("cpu")


def test_a_capture_goes_the_way_of_the_steps_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for a GPU of 80 GB, 50 of them free and 2 cached."""
    device, gb = torch.device("cuda", 0), 1 << 30
    stats = {"reserved_bytes": {"all": {"current": 5 * gb}}}
    stats["allocated_bytes"] = {"all": {"current": 3 * gb}}
    capturing, share = False, 1.0
    monkeypatch.setattr(memory, "_last_free", {})
    for name, value in {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: capturing,
        "mem_get_info": lambda device: 1 / 0 if capturing else (50 * gb, 80 * gb),
        "memory_stats_as_nested_dict": lambda device: stats,
        "get_per_process_memory_fraction": lambda device: share,
        "get_device_properties": lambda device: type("GPU", (), {"total_memory": 80 * gb}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    capturing = True
    assert memory.free_memory(device) == 40 * gb  # nothing is known yet
    capturing = False
    assert memory.free_memory(device) == 52 * gb
    share = 0.25  # 20 GB, of which some are reserved
    reserved = stats["reserved_bytes"]["all"]["current"]
    assert memory.free_memory(device) == 22 * gb - reserved
    share = reserved / (160 * gb)  # of what was reserved before, torch returns none
    assert memory.free_memory(device) == 2 * gb
    share = 1.0
    assert memory.free_memory(device) == 52 * gb
    capturing = True
    assert memory.free_memory(device) == 52 * gb


def test_an_allocator_that_keeps_no_books(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")

    monkeypatch.setattr(memory, "_last_free", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", refuse)
    assert memory.free_memory(torch.device("cuda", 0)) == 50


def group_of(folder: Path, names: tuple[str, str], version: int, limit: str) -> None:
    """A control group that takes 900 bytes, 300 of them pages of files, as Linux shows it."""
    total = "" if version == 2 else "total_"
    own = "" if version == 2 else "active_file 5\ninactive_file 5\n"
    stat = f"anon 500\n{own}{total}active_file 100\n{total}inactive_file 200"
    for name, text in zip((*names, "memory.stat"), (limit, "900", stat), strict=True):
        (folder / name).write_text(text + "\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_limit_leaves(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_free_host_memory", lambda: 5000)
    names = dict(zip((2, 1), memory._GROUPS.values(), strict=True))
    folders = {number: tmp_path / str(number) for number in names}
    folders[version].mkdir()
    monkeypatch.setattr(memory, "_GROUPS", {folders[n]: names[n] for n in names})
    for limit, free in (("1000", 400), ("500", 0), ("9223372036854771712", 5000), ("max", 5000)):
        group_of(folders[version], names[version], version, limit)
        assert memory.free_memory(CPU) == free, limit
    monkeypatch.setattr(memory, "_GROUPS", {tmp_path: names[version]})
    assert memory.free_memory(CPU) == 5000


def test_a_system_that_says_nothing_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.delattr("os.sysconf")
    assert memory._free_host_memory() == memory._UNKNOWN_MEMORY


def test_what_is_remembered_for_checkpoints_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_budgets", {})
    monkeypatch.setattr(planning, "_LITTLE", 0)
    for n in range(1, 2 * planning._MOST_BUDGETS):
        choose(n, 4, 5, torch.float32, CPU, scalar=True)
    assert 0 < len(planning._budgets) <= planning._MOST_BUDGETS
