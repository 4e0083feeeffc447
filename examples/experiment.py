"""What all experiments share: their settings, the runs in their order, results that are resumed.

A run is one training: a margin, a seed, and for LFW a fold. Its row is added to results.json when
it ends, and until then its checkpoint lies beside. So the same command again goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lsoftmax
from balance import DEFERRED, WEIGHTS
from extras import needed
from files import write_json
from sampled import sampled
from training import Augment, Log, Recipe, Training

with needed():
    from tqdm import tqdm

    from lsoftmax.plots import name_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One way to train, what --recipe names: all but the data, the margin and the seed."""

    recipe: Recipe
    network: Callable[..., nn.Module]  # from the training images and the number of features
    features: int  # D
    # From the number of steps, and maybe `keep` and `num_classes`.
    schedule: Callable[..., lsoftmax.LambdaSchedule]
    by_class: bool = False  # whether `keep` counts every class alike

    def annealing(self, images: int, classes: int) -> lsoftmax.LambdaSchedule:
        """Of a training on that many images of that many classes."""
        counted = {"num_classes": classes} if self.by_class else {}
        return self.schedule(self.recipe.steps(images), **counted)


def authors(gamma: float, power: float) -> Callable[..., lsoftmax.LambdaSchedule]:
    """The authors' annealing, which counts steps, however many there will be."""
    return lambda steps, **options: lsoftmax.LambdaSchedule(1000.0, gamma, power, 0.0, **options)


def chosen(setting: Setting, args: argparse.Namespace) -> Setting:
    """The setting with what the command line says otherwise.

    Raises:
        SystemExit: classes are to be counted by a schedule that goes by no angle.
    """
    given = {name: getattr(args, name) for name in ("epochs", "clip", "balance")}
    given = {name: value for name, value in given.items() if value is not None}
    setting = replace(setting, recipe=replace(setting.recipe, **given))
    if args.keep is not None:
        setting = replace(setting, schedule=partial(setting.schedule, keep=args.keep))
    if args.by_class and setting.schedule(1).keep is None:
        raise SystemExit("--by-class: the authors' schedule goes by no angle without --keep")
    return replace(setting, by_class=args.by_class)


# ---- runs and their results ----------------------------------------------------------------------


class Results:
    """The rows of results.json, one a run, and the checkpoints of runs that have not ended.

    Raises:
        SystemExit: the file is of an experiment with other settings, or of none, or can't be
            written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--output {folder}: {error}") from None
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.path = folder / "results.json"
        self.rows: list[Row] = []
        if self.path.exists():
            try:
                saved = json.loads(self.path.read_text())
                saved = {key: saved[key] for key in ("settings", "rows")}
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(
                    f"{self.path} is none of this program's: {error!r}\nName another folder with "
                    "--output, or remove it."
                ) from None
            if saved["settings"] != self.settings:
                raise SystemExit(
                    f"{self.path} has other settings:\n  {saved['settings']}\nnow:\n  "
                    f"{self.settings}\nName another folder with --output, or remove it."
                )
            self.rows = saved["rows"]
        else:  # now, so that a checkpoint never lies beside settings that are not its own
            self.save()

    def save(self) -> None:
        """Write the file, with the versions of what computed it."""
        versions = {"torch": torch.__version__, "lsoftmax": lsoftmax.__version__}
        write_json(self.path, {"settings": self.settings, "versions": versions, "rows": self.rows})

    def find(self, run: Row) -> Row | None:
        """The row of a run that has ended."""
        return next((row for row in self.rows if run.items() <= row.items()), None)

    def checkpoint(self, run: Row) -> Path:
        """Where a run keeps its state."""
        return self.folder / ("-".join(f"{key}{value}" for key, value in run.items()) + ".pt")

    def add(self, run: Row, figures: Row) -> Row:
        """A run has ended: its row to the file, its checkpoint off the disk."""
        row = {**run, **figures}
        self.rows.append(row)
        self.save()
        self.checkpoint(run).unlink(missing_ok=True)
        return row


def run_all(
    results: Results,
    runs: Sequence[Row],
    epochs: int,
    train: Callable[[Row, Path, Callable[[Log], object]], Row],
) -> list[Row]:
    """The rows of all runs, training those that have none; a bar shows where it is."""
    rows = []
    with tqdm(total=len(runs) * epochs, unit="epoch") as bar:

        def after_epoch(log: Log) -> None:
            bar.update()
            bar.set_postfix_str(
                f"loss {log['loss']:.3g}, lam {log['lam']:.3g}, angle {log['angle']:.1f}°, "
                f"satisfied {log['satisfied']:.0%}"
            )
            if log["warning"] is not None:
                bar.write(f"{bar.desc}epoch {log['epoch']}: {log['warning']}")

        try:
            for run in runs:
                bar.set_description(label(run))
                row = results.find(run)
                if row is not None:
                    bar.update(epochs)
                else:
                    row = results.add(run, train(run, results.checkpoint(run), after_epoch))
                rows.append(row)
        except KeyboardInterrupt:
            bar.write("Interrupted. The same command goes on after the last whole epoch.")
            raise SystemExit(130) from None
    return rows


def prepare(
    setting: Setting,
    images: Tensor,
    labels: Tensor,
    classes: int,
    margin: int,
    seed: int,
    *,
    augment: Augment | None = None,
    amp: bool = False,
    sample_rate: float = 1.0,
) -> Training:
    """A training that is about to begin: the same for every margin but for the loss itself."""
    torch.manual_seed(seed)
    network = setting.network(images, setting.features).to(images.device)
    schedule = setting.annealing(len(labels), classes)
    weighted = setting.recipe.balance in (WEIGHTS, DEFERRED)
    weight = torch.ones(classes, device=labels.device) if weighted else None
    criterion = lsoftmax.LSoftmaxLoss(
        setting.features, classes, margin, lam=schedule, weight=weight
    )
    nn.init.kaiming_normal_(criterion.linear.weight)
    criterion = criterion.to(images.device)
    return Training(
        network,
        criterion if sample_rate == 1 else sampled(criterion, sample_rate, seed),
        images,
        labels,
        setting.recipe,
        seed,
        augment=augment,
        amp=amp,
    )


def figures_of(training: Training) -> Row:
    """What every row tells of its training: time, the course of it, and a warning where it ends."""
    history = training.history
    shown = ("loss", "angle", "satisfied", "lam")
    return {
        "seconds": round(training.seconds, 1),
        "warning": history[-1]["warning"],
        "history": {key: [rounded(log[key]) for log in history] for key in shown},
    }


def describe(
    args: argparse.Namespace, setting: Setting, sizes: Sequence[tuple[int, int]], **data: float
) -> dict[str, Any]:
    """The settings that results.json tells, which a resumed experiment must share.

    ``sizes``: images and classes that each training has; where they differ so do the schedules.
    """
    bounds = min(sizes), max(sizes)
    schedules = [setting.annealing(*size).extra_repr() for size in bounds]
    counts = list(dict.fromkeys(images for images, _ in bounds))
    return {
        "recipe": args.recipe,
        **asdict(setting.recipe),
        "features": setting.features,
        "schedule": " to ".join(dict.fromkeys(schedules)),
        "amp": args.amp,
        "train": counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[1]}",
        **data,
    }


# ---- tables --------------------------------------------------------------------------------------


def label(run: Row) -> str:
    """A run in words."""
    rest = "".join(f", {key} {value}" for key, value in run.items() if key != "margin")
    return f"{name_of(run['margin'])}{rest}"


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and where there are several values their standard deviation; nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.2f}"


def by_seed(rows: Iterable[Row], margin: int, key: str) -> list[float]:
    """A figure of each seed; where a seed has several folds, their mean."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["margin"] == margin and row.get(key) is not None:
            values.setdefault(row["seed"], []).append(row[key])
    return [statistics.mean(of_seed) for of_seed in values.values()]


def measured(rows: Iterable[Row], columns: dict[str, str]) -> dict[str, str]:
    """The columns of which there are figures: a file may be older than a column."""
    known = {key for row in rows for key, value in row.items() if value is not None}
    return {key: words for key, words in columns.items() if key in known}


def table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """Markdown: a row a margin, a column a figure: mean and standard deviation over the seeds."""
    columns = measured(rows, columns)
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
    for margin in dict.fromkeys(row["margin"] for row in rows):
        cells = [mean_and_spread(by_seed(rows, margin, key)) for key in columns]
        lines.append(f"| {name_of(margin)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rounded(value: float | None) -> float | None:
    """For a file: four digits, and None for what is no number."""
    return None if value is None or value != value else float(f"{value:.4g}")
