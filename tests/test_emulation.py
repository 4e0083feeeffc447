"""The CUDA emulator itself: right kernels give right results, and each kind of fault is named.

The other tests trust it; these find out whether they may. Kernels and cases: selftest_*.cpp.
"""

import os
import re
import subprocess
import sys

import pytest

from emulation import build

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason="no C++ compiler: the CUDA emulator cannot be built"
)

SOURCES = [build.HERE / f for f in ("selftest.h", "selftest_right.cpp", "selftest_faults.cpp")]

RIGHT = [
    "block_reduction",
    "block_reduction_integers",
    "dynamic_shared_memory",
    "opted_in_shared_memory",
    "ragged_last_warp",
    "votes_and_widths",
    "syncwarp_orders",
    "three_dimensions",
]

# The fault's text; its file and line are checked against the marks in the sources.
FAULTY = {
    "barrier_exit": r"divergent barrier: 63 of 64 threads wait, but thread \(5,0,0\) has exited",
    "barrier_sites": r"divergent barrier: other threads wait at .*:\d+",
    "barrier_in_warp": r"__syncwarp .* waits, but thread \(3,0,0\) waits at the block barrier",
    "mask_omits": r"__any_sync with mask 0xfffffff7: the mask omits the calling lane 3",
    "mask_exited": r"__shfl_xor_sync with mask 0xffffffff: lane 1 has exited",
    "mask_ragged": r"__ballot_sync with mask 0xffffffff: lane 8 does not exist",
    "mask_differs": r"__syncwarp .* thread \(9,0,0\) is in __syncwarp with mask 0x00000fff",
    "warp_sites": r"divergent warp operation: __shfl_xor_sync .*, while thread \(0,0,0\) is in",
    "source_range": r"__shfl_sync: lane 32 is out of range for width 32",
    "source_masked": r"__shfl_sync with mask 0x0000ffff reads lane 20, which is not in the mask",
    "uninitialised": r"read of uninitialised shared memory, .* block \(1,0,0\)",
    "out_of_bounds": r"shared memory index 64 is out of bounds: there are 64 elements",
    "dynamic_out_of_bounds": r"shared memory index 63 is out of bounds: there are 63 elements",
    "race_write_read": r"shared memory race on element \d+: read here, written by thread",
    "race_read_write": r"shared memory race on element 63: written here, read by thread",
    "race_write_write": r"shared memory race on element 0: written here and by thread \(0,0,0\)",
    "race_shuffle": r"shared memory race on element \d+: read here, written by thread",
    "race_two_warps": r"shared memory race on element \d+: read here, written by thread",
    "race_dynamic": r"shared memory race on element 3: written here and by thread \(0,0,0\)",
    "assertion": r"device-side assertion failed: .*threadIdx.x\) < limit",
    "static_too_large": r"too much shared memory: 56000 bytes static",
    "launch_threads": r"invalid launch: blockDim \(1025,1,1\) exceeds 1024 threads",
    "launch_no_blocks": r"invalid launch: gridDim \(0,1,1\) is empty",
    "launch_no_threads": r"invalid launch: blockDim \(1,0,1\) is empty",
    "launch_shared": r"invalid launch: 232449 bytes of dynamic shared memory, the device has",
    "launch_shared_not_opted_in": r"invalid launch: 49153 bytes .* did not opt in",
}

# What the sanitizers say of faults that are theirs to find.
SANITIZED = {
    "overflow": "AddressSanitizer: heap-buffer-overflow",
    "misaligned": "misaligned address",
}


def run(case: str) -> str:
    """Run one case and return what it complains of."""
    return build.load_selftest().selftest_run(case.encode()).decode()


def marked_line(case: str) -> str:
    """File and line, as in "file:7", of what is marked as this case's fault."""
    mark = "// FAULT: " + ("launch" if case.startswith("launch_") else case)
    (place,) = (
        f"{source}:{number}"
        for source in SOURCES
        for number, text in enumerate(source.read_text().splitlines(), 1)
        if text.endswith(mark)
    )
    return place


def check_fault(case: str, message: str) -> None:
    assert re.search(FAULTY[case], message), message
    where = f", {marked_line(case)}"
    if not case.startswith("launch_"):
        where += ", block ("
    assert where in message


def test_cases_are_all_listed():
    text = "".join(source.read_text() for source in SOURCES)
    cases = re.findall(r'^    {"(\w+)", ', text, re.MULTILINE)
    assert cases == [*RIGHT, "order_of_turns", *FAULTY, *SANITIZED]


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernel(case):
    assert run(case) == ""


@pytest.mark.parametrize("case", FAULTY)
def test_fault_is_reported_and_survived(case):
    check_fault(case, run(case))
    assert run("block_reduction") == ""


def test_counters():
    library = build.load_selftest()
    before = build.counters(library)
    assert run("syncwarp_orders") == ""
    after = build.counters(library)
    change = {name: after[name] - before[name] for name in before}
    # Two halves and two pairs besides two whole-warp __syncwarp.
    expected = {"launches": 1, "blocks": 1, "barriers": 1, "warp_operations": 8}
    assert change == expected | {"bytes_read": 0, "bytes_written": 0}


def test_order_of_turns():
    assert run("order_of_turns") == ""
    with build.reversed_order(build.load_selftest()):
        assert "the last thread came last" in run("order_of_turns")
        for case in RIGHT:
            assert run(case) == ""
    assert run("order_of_turns") == ""


def run_sanitized(*cases: str) -> subprocess.CompletedProcess:
    """Run cases in a process of their own, built with the sanitizers."""
    if not build.sanitizer_runtimes():
        pytest.skip("the C++ compiler comes without libasan and libubsan")
    program = (
        "import sys; from emulation import build; library = build.load_selftest(sanitize=True)\n"
        "for case in sys.argv[1:]: print(library.selftest_run(case.encode()).decode())"
    )
    environment = os.environ | build.sanitizer_environment()
    environment["PYTHONPATH"] = str(build.HERE.parent)
    return subprocess.run(
        [sys.executable, "-c", program, *cases], env=environment, capture_output=True, text=True
    )


def test_under_sanitizers():
    """Switching stacks, also away from kernels that failed, is nothing AddressSanitizer minds."""
    result = run_sanitized(*FAULTY, *RIGHT)
    assert result.returncode == 0, result.stderr
    messages = result.stdout.splitlines()
    assert len(messages) == len(FAULTY) + len(RIGHT)
    for case, message in zip(FAULTY, messages, strict=False):
        check_fault(case, message)
    assert messages[len(FAULTY) :] == [""] * len(RIGHT)


@pytest.mark.parametrize("case", SANITIZED)
def test_sanitizers_see_into_kernels(case):
    result = run_sanitized(case)
    assert result.returncode != 0
    assert SANITIZED[case] in result.stderr
    assert "selftest_faults.cpp" in result.stderr
