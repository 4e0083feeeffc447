"""The planted faults fit the code as it is. That tests catch them: `make test-mutations`."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

import mutations
from mutations import ROOT, Fault, StaleFaultError, planted

FAULTS = mutations.all_faults()


def test_every_fault_fits_the_code() -> None:
    """Where an edit has changed the text that a fault replaces, it is to be planted anew."""
    for fault in FAULTS:
        text = (ROOT / fault.file).read_text()
        changed = planted(fault)
        assert changed != text, fault.name
        if fault.file.endswith(".py"):
            ast.parse(changed)


def test_there_are_faults_of_every_kind_and_no_two_alike() -> None:
    names = Counter(fault.name for fault in FAULTS)
    assert max(names.values()) == 1, names.most_common(1)
    places = Counter((fault.file, fault.text, fault.instead) for fault in FAULTS)
    assert max(places.values()) == 1, places.most_common(1)
    files = Counter("engine" if f.file.endswith((".cpp", ".h")) else f.file[:5] for f in FAULTS)
    assert min(files["csrc/"], files["engine"], files["lsoft"]) >= 10, files


def test_the_tests_that_are_to_catch_them_exist() -> None:
    for node in {test for fault in FAULTS for test in fault.tests.split()}:
        file, _, name = node.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        names = {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in names, node


@pytest.mark.parametrize("text", ["not there at all", "import"])
def test_a_fault_that_does_not_fit_is_refused_in_words(text: str) -> None:
    fault = Fault("made up", "lsoftmax/plan.py", text, "", "test_plan.py")
    with pytest.raises(StaleFaultError, match=r"'made up' no longer fits lsoftmax/plan.py: .*once"):
        planted(fault)
