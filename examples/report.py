"""docs/experiments.md from the results in examples/results/: python examples/report.py.

Fills what lies between ``<!-- NAME -->`` and ``<!-- end -->`` with the table of NAME.json, and
draws its pictures beside the page. The README gets the first column of each. Results get there by
hand: an experiment's results.json under the name of the experiment.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import classification
import pages
import pairs
import recognition
from experiment import Row, by_seed, mean_and_spread, measured, name
from figures import draw_angles, draw_roc
from files import write
from verification import FAR_GRID

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "examples" / "results", ROOT / "docs"


@dataclass(frozen=True)
class Part:
    """An experiment's place on the page."""

    columns: dict[str, str]
    paper: tuple[str, dict[int, float]] | None  # a column, and the paper's figure of each margin
    draw: Callable[[Path, Sequence[Row]], None]
    picture: str  # what it shows


# As secondary sources quote the paper's tables.
MNIST = {1: 0.40, 2: 0.32, 3: 0.31, 4: 0.31}
CIFAR10 = {1: 9.05, 2: 7.73, 3: 7.66, 4: 7.58}
CIFAR10_AUGMENTED = {1: 6.50, 2: 6.01, 3: 5.94, 4: 5.92}
CIFAR100 = {1: 32.74, 2: 29.95, 3: 29.87, 4: 29.53}
LFW = {1: 96.53, 2: 97.81, 3: 98.27, 4: 98.71}


def labelled(paper: dict[int, float]) -> Part:
    """An experiment on labelled images."""
    words = "Angles of the test images to their own and to the nearest other class"
    return Part(classification.COLUMNS, ("the paper's, %", paper), draw_angles, words)


def verified(negatives: int, paper: tuple[str, dict[int, float]] | None) -> Part:
    """An experiment on pairs, each training tested with that many different ones."""
    draw = partial(draw_roc, rates=FAR_GRID, negatives=negatives)
    return Part(recognition.columns(negatives), paper, draw, "ROC")


FACES = verified(pairs.PAIRS, ("the paper's accuracy, %", LFW))
PARTS = {
    "mnist": labelled(MNIST),
    "mnist-gpu": labelled(MNIST),
    "mnist-paper": labelled(MNIST),
    "cifar10": labelled(CIFAR10),
    "cifar10-augmented": labelled(CIFAR10_AUGMENTED),
    "cifar100": labelled(CIFAR100),
    "cifar100-small": labelled(CIFAR100),
    "omniglot": verified(pairs.FOLDS * pairs.PAIRS, None),
    "lfw": FACES,
    "lfw-small": FACES,
}


def block(part: Part, results: dict[str, Any]) -> str:
    """The table of an experiment, the paper's figures beside ours, and how it was trained."""
    rows, settings = results["rows"], results["settings"]
    columns = measured(rows, part.columns)
    head = list(columns.values()) + ([part.paper[0]] if part.paper else [])
    lines = ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for margin in dict.fromkeys(row["margin"] for row in rows):
        cells = [mean_and_spread(by_seed(rows, margin, key)) for key in columns]
        if part.paper:
            cells.append(f"{part.paper[1][margin]:.2f}" if margin in part.paper[1] else "")
        lines.append(f"| {name(margin)} | " + " | ".join(cells) + " |")
    seeds, folds = ({row[key] for row in rows if key in row} for key in ("seed", "fold"))
    tested = f"Seeds: {len(seeds)}" + (f"; folds: {len(folds)} of 10" if folds else "")
    given = ", ".join(
        f"{key} {value}"
        for key, value in settings.items()
        if value is not None and value is not False and value != []
    )
    warned = sum(row["warning"] is not None for row in rows)
    lines += ["", f"{tested}; {given}; torch {results['versions']['torch']}."]
    if warned:
        lines.append(f"{warned} of {len(rows)} trainings ended with a warning of collapse.")
    return "\n".join(lines) + "\n"


def fill(page: str, results: dict[str, dict[str, Any]]) -> str:
    """The page with the block of each experiment that has results, and a word for the others.

    Raises:
        SystemExit: the page has no place for one.
    """
    for key, values in results.items():
        picture = f"![{PARTS[key].picture}](experiments-{key}.png)\n"
        page = pages.fill(page, key, f"{block(PARTS[key], values)}\n{picture}")
    for key in set(pages.blocks(page)) - results.keys():
        page = pages.fill(page, key, "Not measured yet.\n")
    return page


def summary(results: dict[str, dict[str, Any]]) -> str:
    """A line an experiment: its first column for every margin, the paper's figure in brackets."""
    lines = ["| | " + " | ".join(map(name, MNIST)) + " |", "|---" * (1 + len(MNIST)) + "|"]
    for key, values in results.items():
        column, words = next(iter(PARTS[key].columns.items()))
        paper = PARTS[key].paper[1] if PARTS[key].paper else {}
        trained, cells = {row["margin"] for row in values["rows"]}, []
        for margin in MNIST:
            if margin not in trained:
                cells.append("")
                continue
            cell = mean_and_spread(by_seed(values["rows"], margin, column))
            cells.append(cell + (f" ({paper[margin]:.2f})" if margin in paper else ""))
        lines.append(f"| {key}: {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fill_readme(page: str, results: dict[str, dict[str, Any]]) -> str:
    """The README with its table of the results."""
    return pages.fill(page, "experiments", summary(results))


def load() -> dict[str, dict[str, Any]]:
    """The results that are there."""
    paths = {key: RESULTS / f"{key}.json" for key in PARTS}
    return {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    results, page = load(), DOCS / "experiments.md"
    write(page, fill(page.read_text(), results).encode())
    readme = ROOT / "README.md"
    write(readme, fill_readme(readme.read_text(), results).encode())
    for key, values in results.items():
        PARTS[key].draw(DOCS / f"experiments-{key}.png", values["rows"])
    print(f"{page}: {', '.join(results)}")


if __name__ == "__main__":
    main()
