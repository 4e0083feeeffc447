"""The emulation of Hopper's tensor cores, copy engine and barriers: what is right, what it reports.

test_hopper.py trusts it; these find out whether it may. The kernel: emulation/selftest_hopper.cpp.
"""

from __future__ import annotations

import re

import pytest

from emulation import build

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason="no C++ compiler: the CUDA emulator cannot be built"
)

SOURCE = build.HERE / "selftest_hopper.cpp"

# The fault's text, and the mark of its line where that is not the case's own name.
FAULTY = {
    "not_initialised": (r"mbarrier is not initialised", ""),
    "no_block_barrier": (r"initialised by thread \(0,0,0\) with no block barrier in between", ""),
    "not_published": (r"mbarrier is not published to the copy engine", ""),
    "too_many_arrivals": (r"mbarrier: more arrivals than it counts", ""),
    "wrong_bytes": (r"deadlock: the phase of this mbarrier does not end", ""),
    "misplaced": (r"address that is not a multiple of 1024", ""),
    "beyond_memory": (r"tile beyond the end of shared memory", ""),
    "overwritten": (r"copy over a tile that products of thread \(\d+,0,0\) may still read", ""),
    "not_waited": (r"reads a tile that the thread has not waited for", "multiply"),
    "elsewhere": (r"reads what nobody has copied", "multiply"),
    "no_fence": (r"no fence since the sums were last touched", "multiply"),
    "no_swizzle": (r"only tiles with the 128-byte swizzle", "multiply"),
    "between_patterns": (r"tile between two patterns", "multiply"),
    "beyond_columns": (r"columns beyond those of the tile", "multiply"),
    "different": (r"threads of a warpgroup ask for different products", "multiply"),
}


def run(case: str) -> str:
    """Run one case and return what it complains of."""
    return build.load_hopper().hopper_selftest_run(case.encode()).decode()


def test_cases_are_all_listed():
    assert set(re.findall(r'is\("(\w+)"\)', SOURCE.read_text())) == set(FAULTY)


def test_product():
    assert run("") == ""
    with build.reversed_order(build.load_hopper()):
        assert run("") == ""


@pytest.mark.parametrize("case", FAULTY)
def test_fault_is_reported_and_survived(case):
    text, mark = FAULTY[case]
    message = run(case)
    assert re.search(text, message), message
    (line,) = (
        number
        for number, source_line in enumerate(SOURCE.read_text().splitlines(), 1)
        if source_line.endswith("// FAULT: " + (mark or case))
    )
    assert f", {SOURCE}:{line}, block (0,0,0)" in message
    assert run("") == ""
