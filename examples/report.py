"""docs/experiments.md from the results in examples/results/: python examples/report.py.

Fills what lies between ``<!-- NAME -->`` and ``<!-- end -->`` with the table of NAME.json, and
draws its pictures beside the page. What was trained otherwise too, NAME-keep0.7.json with that
``keep``, goes to a table that compares both. The README gets the first column of each. Results get
there by hand: an experiment's results.json under the name of the experiment.
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
from experiment import Row, by_seed, mean_and_spread, measured
from figures import draw_angles, draw_roc
from files import write
from lsoftmax.plots import name_of
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
    compared: int = 2  # columns, the first, that tell one way to train from another


# As secondary sources quote the paper's tables.
MNIST = {1: 0.40, 2: 0.32, 3: 0.31, 4: 0.31}
CIFAR10 = {1: 9.05, 2: 7.73, 3: 7.66, 4: 7.58}
CIFAR10_AUGMENTED = {1: 6.50, 2: 6.01, 3: 5.94, 4: 5.92}
CIFAR100 = {1: 32.74, 2: 29.95, 3: 29.87, 4: 29.53}
LFW = {1: 96.53, 2: 97.81, 3: 98.27, 4: 98.71}


ANGLES = "Angles of the test images to their own and to the nearest other class"
TAIL = ("test_error", "rare_error", "unanswered")  # the figures of classes of unequal size

MARGINS = tuple(MNIST)
HEAD = ("| | " + " | ".join(map(name_of, MARGINS)) + " |", "|---" * (1 + len(MARGINS)) + "|")


def labelled(paper: dict[int, float]) -> Part:
    """An experiment on labelled images."""
    return Part(classification.COLUMNS, ("the paper's, %", paper), draw_angles, ANGLES)


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
    "cifar100-tail": Part(
        {key: classification.COLUMNS[key] for key in TAIL}, None, draw_angles, ANGLES, len(TAIL)
    ),
    "omniglot": verified(pairs.FOLDS * pairs.PAIRS, None),
    "lfw": FACES,
    "lfw-small": FACES,
}


# Experiments that were trained otherwise too, by the block that compares them: the end of the name
# of their results, and what they are called there.
VARIANTS = {
    "keep": {"keep0.7": "*keep=0.7*"},
    "balanced": {
        "weights": "*class weights*",
        "deferred": "*in the last fifth*",
        "deferred-by-class": "*and keep by class*",
    },
    "counted": {"counted": "*keep by class*"},
    "sampled": {"sample0.5": "*half of the classes a step*", "sample0.2": "*a fifth*"},
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
        lines.append(f"| {name_of(margin)} | " + " | ".join(cells) + " |")
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
    made = {
        name: compared(results, variants)
        for name, variants in VARIANTS.items()
        if any(key.endswith(tuple(variants)) for key in results)
    }
    for key, part in measured_parts(results):
        picture = f"![{part.picture}](experiments-{key}.png)\n"
        made[key] = f"{block(part, results[key])}\n{picture}"
    for key in made.keys() | set(pages.blocks(page)):
        page = pages.fill(page, key, made.get(key, "Not measured yet.\n"))
    return page


def compared(results: dict[str, dict[str, Any]], variants: dict[str, str]) -> str:
    """Experiments that were trained otherwise too: a line each way of some figures, from the seeds
    and folds that were trained every way.
    """
    lines = list(HEAD)
    for key, part in measured_parts(results):
        ways = {"": key} | {words: f"{key}-{end}" for end, words in variants.items()}
        rows = {words: results[name]["rows"] for words, name in ways.items() if name in results}
        if len(rows) == 1:
            continue
        common = set.intersection(*({run_of(row) for row in each} for each in rows.values()))
        rows = {
            words: [row for row in each if run_of(row) in common] for words, each in rows.items()
        }
        folds = {row["fold"] for row in rows[""] if "fold" in row}
        which = f" ({len(folds)} of 10 folds)" if folds else ""
        for column, title in list(part.columns.items())[: part.compared]:
            for words, each in rows.items():
                lines.append(line(words or f"{key}{which}: {title}", figures(each, column)))
    return "\n".join(lines) + "\n"


def run_of(row: Row) -> tuple[int, ...]:
    """What tells the trainings of an experiment apart."""
    return row["margin"], row["seed"], row.get("fold", 0)


def summary(results: dict[str, dict[str, Any]]) -> str:
    """A line an experiment: its first column for every margin, the paper's figure in brackets."""
    lines = list(HEAD)
    for key, part in measured_parts(results):
        column, words = next(iter(part.columns.items()))
        paper = part.paper[1] if part.paper else {}
        cells = figures(results[key]["rows"], column)
        for margin in paper.keys() & cells.keys():
            cells[margin] += f" ({paper[margin]:.2f})"
        lines.append(line(f"{key}: {words}", cells))
    return "\n".join(lines) + "\n"


def measured_parts(results: dict[str, dict[str, Any]]) -> list[tuple[str, Part]]:
    """The experiments that have results, in the page's order."""
    return [(key, part) for key, part in PARTS.items() if key in results]


def figures(rows: Sequence[Row], column: str) -> dict[int, str]:
    """A column's cells, by margin."""
    trained = {row["margin"] for row in rows}
    return {margin: mean_and_spread(by_seed(rows, margin, column)) for margin in trained}


def line(title: str, cells: dict[int, str]) -> str:
    """A line of a table that has a column a margin."""
    return f"| {title} | " + " | ".join(cells.get(margin, "") for margin in MARGINS) + " |"


def fill_readme(page: str, results: dict[str, dict[str, Any]]) -> str:
    """The README with its table of the results."""
    return pages.fill(page, "experiments", summary(results))


def load() -> dict[str, dict[str, Any]]:
    """The results that are there."""
    ends = ["", *(f"-{end}" for variants in VARIANTS.values() for end in variants)]
    names = [key + end for key in PARTS for end in ends]
    paths = {name: RESULTS / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    results, page = load(), DOCS / "experiments.md"
    write(page, fill(page.read_text(), results).encode())
    readme = ROOT / "README.md"
    write(readme, fill_readme(readme.read_text(), results).encode())
    for key, part in measured_parts(results):
        part.draw(DOCS / f"experiments-{key}.png", results[key]["rows"])
    print(f"{page}: {', '.join(results)}")


if __name__ == "__main__":
    main()
