"""Which annealings train? Many small trainings with softmax and L-Softmax, told apart by failures.

    python examples/study.py                             scikit-learn's digits, no download
    python examples/study.py --data DIR                  MNIST and Omniglot too
    python examples/study.py --cells "mnist*margin=4*"   cells whose name matches
    python examples/study.py --report                    docs/training.md anew, from the results

Trainings that differ in seed, margin and annealing only run side by side, and are saved together,
one file a task; started again, the study goes on where it was. docs/training.md says what it found.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import files
import study_report
from data import MissingDataError
from extras import needed
from study_runs import train
from study_tasks import ANNEALINGS, CLIPS, TASKS, UNEQUAL, Cell

with needed():
    from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
RATES = (0.01, 0.03, 0.1)


def grid(seeds: int) -> Iterator[Cell]:
    """All cells; seeds outermost, so that a study cut short has treated all annealings alike."""
    for seed in range(seeds):
        for margin in (1, 2, 3, 4):
            for annealing in ANNEALINGS:
                if (margin == 1) == (annealing == "softmax"):
                    yield from cells(margin, annealing, seed)


def cells(margin: int, annealing: str, seed: int) -> Iterator[Cell]:
    """Where one loss is tried."""

    def cell(task: str, lr: float = 0.1, **options: str) -> Cell:
        return Cell(task, margin, annealing, lr, seed, **options)

    for activation in ("relu", "prelu"):
        yield from (cell("digits", lr, activation=activation) for lr in RATES)
    yield cell("digits", dtype="bfloat16")
    yield cell("digits", 1e-3, optimizer="adamw")
    yield cell("mnist")
    if margin in (1, 4):
        yield cell("mnist", 0.01)
        yield cell("mnist", activation="prelu")
        for task in ("digits-long", "mnist-long"):
            yield cell(task)
            yield cell(task, 0.01)
            yield cell(task, activation="prelu")
    if margin in (1, 2, 4):
        for task, activation in itertools.product(UNEQUAL, ("relu", "prelu")):
            yield cell(task, activation=activation)
        yield cell("omniglot")
        yield cell("omniglot-long")
    if margin == 3 or annealing not in ("softmax", "for_steps", "by_angle"):
        return
    clipped = [f"-clip{clip}" for clip in CLIPS]
    both = ("relu", "prelu")
    for clip, activation, lr in itertools.product(["", *clipped], both, (*RATES, 0.3)):
        yield cell("digits-plain" + clip, lr, activation=activation)
    for clip in clipped:
        yield cell("omniglot" + clip)
    if margin != 2:
        for clip, activation in itertools.product(clipped, both):
            yield cell("digits-long" + clip, activation=activation)
            yield cell("mnist-long" + clip, activation=activation)


def load_results(folder: Path, task: str = "*") -> dict[str, dict[str, Any]]:
    """Figures by the cell's key."""
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"study-{task}.json")):
        runs |= json.loads(path.read_text())["runs"]
    return runs


def save_results(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """One training a line."""
    machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(run)}" for key, run in runs.items())
    files.write(path, f'{{"made_by": {json.dumps(machine)}, "runs": {{\n{lines}\n}}}}\n'.encode())


def run(wanted: Sequence[Cell], folder: Path, data: Path | None) -> None:
    """Train what is not in the results yet, group by group."""
    done = load_results(folder)
    missing = [cell for cell in wanted if cell.key not in done]
    print(f"{len(wanted)} trainings, {len(wanted) - len(missing)} of them done before")
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in sorted(missing, key=lambda cell: cell.margin):
        groups.setdefault(cell.group, []).append(cell)
    for (task, *_), cells in tqdm(sorted(groups.items()), unit="group"):
        split = TASKS[task].load(data)
        runs = load_results(folder, task)
        figures = train(cells, split)
        runs |= {cell.key: figure for cell, figure in zip(cells, figures, strict=True)}
        save_results(folder / f"study-{task}.json", runs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder of MNIST and Omniglot; without it, digits only")
    add("--cells", default="*", help="only cells whose name matches this pattern")
    add("--seeds", type=int, default=5, help="trainings a cell (%(default)s)")
    add("--results", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    add("--list", action="store_true", help="only say which cells there are")
    add("--report", action="store_true", help="no training: tables and plots into docs/")
    args = parser.parse_args(arguments)
    if args.report:
        study_report.write(load_results(args.results))
        return
    wanted = [cell for cell in grid(args.seeds) if fnmatch.fnmatch(cell.key, f"*{args.cells}*")]
    if args.data is None:
        wanted = [cell for cell in wanted if cell.task.startswith("digits")]
    if args.list:
        print("\n".join(cell.key for cell in wanted))
        return
    args.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # networks this small gain nothing from two
    try:
        run(wanted, args.results, args.data)
    except MissingDataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
