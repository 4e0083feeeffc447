"""The documentation is right: its Python runs, its links lead somewhere, its commands exist.

A page's blocks run from top to bottom in one namespace. An HTML comment on the line before a fence
says otherwise: ``<!-- skip: reason -->`` (never run), ``<!-- needs: name -->`` (run where that
module, or attribute of one, is there).
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest

import lsoftmax
from ecosystem import needed

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if "_build" not in path.parts
}
FENCE = re.compile(r"^( *)```([\w{}-]*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (skip|needs): (.+) -->\n\Z")


class Block(NamedTuple):
    """Python on a page, with as many empty lines before it that its line numbers are the page's."""

    code: str
    needs: str | None


def python_blocks(text: str) -> list[Block]:
    blocks = []
    for fence in FENCE.finditer(text):
        if fence[2] != "python":
            continue
        comment = COMMENT.search(text, 0, fence.start())
        if comment and comment[1] == "skip":
            continue
        lines_before = text.count("\n", 0, fence.start(3))
        blocks.append(Block("\n" * lines_before + fence[3], comment[2] if comment else None))
    return blocks


def prose_and_commands(text: str) -> str:
    """A page without its fenced blocks, but for those of a shell."""
    return FENCE.sub(lambda fence: fence[3] if fence[2] == "sh" else "", text)


BLOCKS = {name: python_blocks(path.read_text()) for name, path in PAGES.items()}
# Each page with what needs nothing, and once more with the blocks of each name that some need.
RUNS = [
    (name, needs)
    for name, blocks in BLOCKS.items()
    for needs in dict.fromkeys(block.needs for block in blocks)
]


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the one process of a `torchrun --nproc-per-node 1`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


@pytest.mark.parametrize(("page", "needs"), RUNS)
@pytest.mark.usefixtures("torchrun", "one_thread")
def test_python_runs(
    page: str, needs: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (needs or "").split():
        needed(name)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page}
    for block in BLOCKS[page]:
        if block.needs in (None, needs):
            exec(compile(block.code, PAGES[page], "exec"), namespace)


def test_python_is_fenced() -> None:
    """Or it would not be run."""
    for name, path in PAGES.items():
        stray = re.search(r"^ {4,}(import|from) \w+.*", FENCE.sub("", path.read_text()), re.M)
        assert stray is None, f"{name}: {stray}"


DOCTESTED = [
    ".".join(("lsoftmax", *path.relative_to(Path(lsoftmax.__file__).parent).with_suffix("").parts))
    for path in sorted(Path(lsoftmax.__file__).parent.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", DOCTESTED)
def test_docstrings_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} needs {error.name}, which is not here")
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0, capsys.readouterr().out


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower())
    return kept.replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text())
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images(page: str) -> None:
    text = FENCE.sub("", PAGES[page].read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (PAGES[page].parent / target).resolve() if target else PAGES[page]
        assert path.exists(), f"{page} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(path), f"{page} links to {link}: {sorted(anchors(path))}"


MAKE_TARGETS = set(
    re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
)
OTHERS = {"build"}  # programs of others that nothing here needs
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "lsoftmax", "tests")


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_files(page: str) -> None:
    """`make` targets, `python -m` modules and files of this project that a page names."""
    text = prose_and_commands(PAGES[page].read_text())
    for target in re.findall(r"(?:^ {4}|`|\$ )make ((?:\w+=\S+ )*[\w-]+)", text, re.MULTILINE):
        assert target.split()[-1] in MAKE_TARGETS, f"{page}: make {target}"
    for module in re.findall(r"python -m ([\w.]+)", text):
        file = ROOT / module.replace(".", "/")
        ours = module in OTHERS or file.is_dir() or file.with_suffix(".py").is_file()
        assert ours or importlib.util.find_spec(module), f"{page}: python -m {module}"
    for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w.*/-]*\w", text):
        assert [*ROOT.glob(name)], f"{page}: {name} is not there"
    for name in re.findall(r"(?<![\w/.*-])[\w.-]+\.(?:py|cuh?|cpp|sh)\b", text):
        assert [*ROOT.glob(f"*/{name}"), *ROOT.glob(name)], f"{page}: {name} is not there"


PUBLIC = ["lsoftmax", "lsoftmax.functional", "lsoftmax.reference", "lsoftmax.distributed"]
NEEDS = {"lsoftmax.plots": "matplotlib", "lsoftmax.metric_learning": "pytorch_metric_learning"}


def test_every_public_name_has_an_entry() -> None:
    entries: set[str] = set()
    for page in sorted((ROOT / "docs" / "api").glob("*.rst")):
        module = ""
        for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", page.read_text(), re.MULTILINE):
            if kind in ("currentmodule", "automodule"):
                module = name
                entries.add(name)
            if kind in ("autoclass", "autofunction"):
                entries.add(f"{module}.{name}")
    for module in [*PUBLIC, *NEEDS]:
        if module in NEEDS and importlib.util.find_spec(NEEDS[module]) is None:
            continue
        for name in importlib.import_module(module).__all__:
            assert f"{module}.{name}" in entries, f"docs/api has nothing on {module}.{name}"


@pytest.mark.nightly
def test_pages_build(tmp_path: Path) -> None:
    """Without a warning; with an entry in the index for every class."""
    pytest.importorskip("sphinx", reason="needs the extra 'docs'")
    pytest.importorskip("myst_parser", reason="needs the extra 'docs'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E"]
    run = subprocess.run(
        [*command, "-d", tmp_path / "doctrees", ".", tmp_path / "html"],
        cwd=ROOT / "docs",
        env=os.environ | {"PYTHONPATH": str(Path(lsoftmax.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    inventory = (tmp_path / "html" / "objects.inv").read_bytes()
    names = zlib.decompress(inventory.split(b"\n", 4)[4]).decode()
    assert "lsoftmax.LSoftmaxLoss py:class" in names
    assert "lsoftmax.functional.lsoftmax_loss py:function" in names
