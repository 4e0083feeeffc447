"""Plants each fault in a copy of the source tree and runs the tests that are to catch it.

    cd tests; python -m mutations                 all that build/mutations does not know yet
    python -m mutations -k schedule --again       those with that in name or file, once more

The working tree is not touched: every job has its own copy, in build/mutations/, where emulated
kernels are compiled once and then only what a fault changes. First, the tests are run without a
fault: they must be green. What was found is remembered for as long as the sources are the same, so
that an interrupted run goes on. A survivor ends the run with exit status 1.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import queue
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fresh import FreshPythons

from . import ROOT, Fault, all_faults, planted

FOLDER = ROOT / "build" / "mutations"
PAGE = ROOT / "docs" / "mutations.md"
COPIED = ("csrc", "lsoftmax", "tests", "examples", "pyproject.toml", "setup.py")
LIMIT = 900  # seconds, compiling included: a fault may make a test wait for ever
RUN_TESTS = "import os, pytest; os.chdir('tests'); raise SystemExit(pytest.main({arguments!r}))"


class Outcome(NamedTuple):
    """``state``: "caught", "survived", or "invalid" where the tests could not be run."""

    state: str
    words: str  # the test that caught it, or what went wrong


def sources() -> list[Path]:
    """The files that tests need, relative to the root."""
    found: list[Path] = []
    for name in COPIED:
        path = ROOT / name
        files = [path] if path.is_file() else path.rglob("*")
        found += [file.relative_to(ROOT) for file in files if file.is_file()]
    left = {".pyc", ".so"}
    return sorted(f for f in found if f.suffix not in left and f.name != "_build_info.json")


def fingerprint(files: Iterable[Path]) -> str:
    """Of everything that every outcome depends on: all but the tests, which count by file."""
    digest = hashlib.sha256()
    for file in files:
        apart = file.name.startswith("test_") or "mutations" in file.parts
        if not apart and "examples" not in file.parts:
            digest.update(file.as_posix().encode() + (ROOT / file).read_bytes())
    return digest.hexdigest()


def texts_of(tests: str) -> str:
    """The files of node ids, and the files of tests that those import from."""
    files = {test.partition("::")[0] for test in tests.split()}
    texts = {file: (ROOT / "tests" / file).read_text() for file in files}
    more = {
        f"{m}.py" for text in texts.values() for m in re.findall(r"^from (test_\w+)", text, re.M)
    }
    texts |= {file: (ROOT / "tests" / file).read_text() for file in more}
    return "".join(texts[file] for file in sorted(texts))


class Results:
    """What is known: a file a fault, so that any number of processes may add to it."""

    def __init__(self, tree: str) -> None:
        self.tree = tree
        self.folder = FOLDER / "results"
        self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, tests: str, *more: str) -> Path:
        words = "\0".join((self.tree, texts_of(tests), tests, *more))
        return self.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.json"

    def get(self, tests: str, *more: str) -> Outcome | None:
        file = self._file(tests, *more)
        return Outcome(*json.loads(file.read_text())) if file.exists() else None

    def put(self, outcome: Outcome, tests: str, *more: str) -> None:
        file = self._file(tests, *more)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(outcome))
        part.replace(file)


class Copy:
    """A copy of the source tree with what was built in it, for one job at a time."""

    def __init__(self, files: list[Path], jobs: int) -> None:
        for number in itertools.count():
            self.root = FOLDER / f"copy-{number}"
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / "lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                self._lock.close()
        self._bring_up_to_date(files)
        self.pythons = FreshPythons("pytest", "torch.utils.cpp_extension")
        compilers = max(1, (os.cpu_count() or 1) // jobs)
        self.environment = {"PYTHONPATH": str(self.root), "MAX_JOBS": str(compilers)}

    def _bring_up_to_date(self, files: list[Path]) -> None:
        """Files that have not changed stay as they are, and so do the objects made of them."""
        wanted = set(files)
        for old in list(self.root.rglob("*")):
            name = old.relative_to(self.root)
            if old.is_file() and name.parts[0] in COPIED and name not in wanted:
                old.unlink()
        for file in files:
            copy, text = self.root / file, (ROOT / file).read_bytes()
            if not copy.exists() or copy.read_bytes() != text:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(text)

    def run(self, backend: str, tests: Iterable[str], *more: str) -> tuple[int, str]:
        arguments = ["-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "--backend", backend]
        code = RUN_TESTS.replace("'tests'", repr(str(self.root / "tests")))
        code = code.format(arguments=[*arguments, *more, *tests])
        return self.pythons.run(self.root, code, LIMIT, **self.environment)

    def judge(self, fault: Fault) -> Outcome:
        """What the tests make of the fault."""
        file = self.root / fault.file
        whole = file.read_text()
        file.write_text(planted(fault, self.root))
        try:
            status, output = self.run(fault.backend, fault.tests.split(), "-x")
        except TimeoutError:
            return Outcome("caught", f"no end after {LIMIT} s")
        finally:
            file.write_text(whole)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        if status == 0:
            return Outcome("survived", "")
        if status == 1 and failed:
            return Outcome("caught", failed[1])
        if status < 0:
            return Outcome("caught", f"crash (signal {-status})")
        return Outcome("invalid", output[-3000:])


def check_green(copy: Copy, backend: str, faults: list[Fault], results: Results) -> None:
    """Ends the program where the tests fail without any fault."""
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests.split()))
    tests = [test for test in tests if results.get(test, backend) is None]
    if not tests:
        return
    print(f"without a fault, --backend {backend}: {len(tests)} tests ...", flush=True)
    status, output = copy.run(backend, tests)
    print(output.strip().split("\n")[-1], flush=True)
    if status != 0:
        raise SystemExit(f"The tests must be green first:\n{output[-6000:]}")
    for test in tests:
        results.put(Outcome("green", ""), test, backend)


def judge_all(faults: list[Fault], copies: list[Copy], results: Results) -> None:
    """Files are dealt out to the copies: in one, a fault after the other builds its object once."""
    free: queue.Queue[Copy] = queue.Queue()
    for copy in copies:
        free.put(copy)
    with tqdm(total=len(faults), unit="fault") as bar:

        def work(of_one_file: list[Fault]) -> None:
            copy = free.get()
            try:
                for fault in of_one_file:
                    outcome = copy.judge(fault)
                    results.put(outcome, fault.tests, *fault)
                    bar.update()
                    if outcome.state != "caught":
                        bar.write(f"{outcome.state}: {fault.name} ({fault.file})\n{outcome.words}")
            finally:
                free.put(copy)

        groups = itertools.groupby(faults, key=lambda fault: fault.file)
        with ThreadPoolExecutor(len(copies)) as pool:
            list(pool.map(work, [list(group) for _, group in groups]))


def table(rows: list[tuple[Fault, Outcome]]) -> str:
    lines = ["| fault | file | tests | caught by |", "|---|---|---|---|"]
    for fault, outcome in rows:
        words = f"`{outcome.words}`" if outcome.state == "caught" else f"**{outcome.state}**"
        lines.append(f"| {fault.name} | {fault.file} | {fault.backend} | {words} |")
    return "\n".join(lines)


def write_page(text: str) -> None:
    before, rest = PAGE.read_text().split("<!-- faults -->\n")
    _, after = rest.split("<!-- end -->")
    PAGE.write_text(f"{before}<!-- faults -->\n{text}\n<!-- end -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mutations", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "-k", default="", help="only faults with these words in name, file or backend"
    )
    parser.add_argument("--jobs", type=int, default=1, help="copies worked in at a time")
    parser.add_argument("--again", action="store_true", help="also what is known already")
    parser.add_argument("--page", action="store_true", help="write docs/mutations.md")
    args = parser.parse_args()

    files = sources()
    results = Results(fingerprint(files))
    words = args.k.lower().split()
    faults = [f for f in all_faults() if all(w in f"{f[:2]} {f.backend}".lower() for w in words)]
    for fault in faults:
        planted(fault)
    todo = [fault for fault in faults if args.again or results.get(fault.tests, *fault) is None]
    copies = [Copy(files, args.jobs) for _ in range(args.jobs if todo else 0)]
    for backend in ("portable", "emulation"):
        part = [fault for fault in todo if fault.backend == backend]
        if part:
            check_green(copies[0], backend, part, results)
            judge_all(part, copies, results)

    rows = [(fault, results.get(fault.tests, *fault) or Outcome("unknown", "")) for fault in faults]
    print(table(rows))
    if args.page:
        write_page(table(rows))
    missed = [fault.name for fault, outcome in rows if outcome.state != "caught"]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} faults caught")
    if missed:
        raise SystemExit("not caught: " + "; ".join(missed))


if __name__ == "__main__":
    main()
