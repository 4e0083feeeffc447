"""The trainability study: its trainings are those of the layer, and its page is what they gave."""
# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the examples need {package}")

import lsoftmax
import study
import study_report
import study_runs
import study_tasks
from study_tasks import ANNEALINGS, TASKS, Cell

UNEQUAL = ("weighted", "deferred", "balanced")
SHORT = ["digits", "digits-plain-clip1", *(f"digits-unequal-{way}" for way in UNEQUAL)]
PAGE = study_report.DOCS / "training.md"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def short(monkeypatch):
    """Tasks of digits for five epochs, the least with a last fifth."""
    for name in SHORT:
        monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], epochs=5))


def trained(cell: Cell, split) -> tuple[float, dict[str, float]]:
    """The same training as a user writes it, one network and the layer: error, other figures."""
    task = TASKS[cell.task]
    batches = len(split.train_labels) // task.batch
    steps = task.epochs * batches
    network, classifier = study_tasks.build(cell, split.classes)
    lam = ANNEALINGS[cell.annealing](steps, split.classes)
    counts = torch.bincount(split.train_labels)
    weight = 1 / counts / (1 / counts).dot(counts / counts.sum())  # of the images: 1 on average
    head = lsoftmax.LSoftmaxLoss(
        *(task.features, split.classes, cell.margin),
        lam=lam,
        weight=torch.ones(split.classes),
    )
    head.load_state_dict(classifier.state_dict(prefix="linear."), strict=False)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, cell.lr, momentum=0.9, weight_decay=5e-4)
    drops = [int(0.6 * steps), int(0.85 * steps)]
    rates = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    generator = torch.Generator().manual_seed(cell.seed)
    count = len(split.train_labels)
    sampler = torch.utils.data.WeightedRandomSampler(
        weight[split.train_labels], count, generator=generator
    )
    weights_begin = {"weights": 0, "deferred": 4}
    for epoch in range(task.epochs):
        if epoch == weights_begin.get(task.balance):
            head.weight.copy_(weight)
        if task.balance == "batches":
            order = torch.tensor(list(sampler))
        else:
            order = torch.randperm(count, generator=generator)
        for batch in order.split(task.batch)[:batches]:
            optimizer.zero_grad()
            head(network(split.train_images[batch]), split.train_labels[batch]).backward()
            if task.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, task.clip)
            optimizer.step()
            rates.step()
    network.eval()
    with torch.no_grad():
        features = network(split.test_images)
        stats = lsoftmax.margin_stats(features, head.linear.weight, split.test_labels)
        wrong = head.linear(features).argmax(1) != split.test_labels
    return 100 * wrong.double().mean().item(), {
        "angle": stats.angle.item(),
        "smallest_weight_norm": stats.weight_norm_min.item(),
        "lam": head.schedule.upcoming().item(),
    }


@pytest.mark.parametrize("task", SHORT)
def test_a_training_is_that_of_the_layer(task, short):
    """Red if the study anneals, steps, clips or measures in another way than the layer it advises
    on.
    """
    seed = int(torch.randint(2**20, ()))
    names = "constant 5", "for_steps", "by_angle", "by_angle, num_classes=C"
    cells = [
        Cell(task, 1, "softmax", 0.03, seed),
        *(Cell(task, 3, name, 0.03, seed) for name in names),
    ]
    split = TASKS[task].load(None)
    for cell, figures in zip(cells, study_runs.train(cells, split), strict=True):
        error, expected = trained(cell, split)
        assert abs(figures["error"] - error) <= 0.41, cell  # two images of 500
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value, rel=5e-3), (cell, name)


def test_goes_on_where_it_was(short, tmp_path, capsys):
    """Red if a second start trains again what is there, or loses it."""
    cells = "task=digits margin=[23] annealing=for_steps lr=0.1 *=relu optimizer=sgd dtype=float32"
    arguments = ["--results", str(tmp_path), "--cells", cells]
    study.main([*arguments, "--seeds", "1"])
    path = tmp_path / "study-digits.json"
    first = json.loads(path.read_text())["runs"]
    assert len(first) == 2
    study.main([*arguments, "--seeds", "2"])
    assert "4 trainings, 2 of them done before" in capsys.readouterr().out
    both = json.loads(path.read_text())["runs"]
    assert len(both) == 4
    assert {key: both[key] for key in first} == first


def test_page_is_made_from_the_results():
    """Red if a result was replaced, or a table edited, without ``study.py --report``."""
    results = study_report.cells_of(study.load_results(study.RESULTS))
    page = PAGE.read_text()
    assert study_report.fill(page, results) == page
    for page in (PAGE.with_name("faq.md"), PAGE.parents[1] / "README.md"):
        assert f"{len(results):,} trainings" in page.read_text()


def run(error: float, angle: float = 20.0, diverged: int | None = None) -> dict:
    return {"error": error, "angle": angle, "diverged": diverged}


def test_failures_and_ratios():
    baseline = {Cell("mnist", 1, "softmax", 0.1, s): run(e, 50) for s, e in ((0, 2.0), (1, 4.0))}
    results = baseline | {
        Cell("mnist", 4, "for_steps", 0.1, 0): run(7.9, 10),
        Cell("mnist", 4, "for_steps", 0.1, 1): run(8.1, 15),  # 5.1 above softmax's 3
        Cell("mnist", 4, "by_angle", 0.1, 0): run(3.0, 25, diverged=7),
        Cell("mnist", 4, "by_angle", 0.01, 0): run(90.0),  # nothing to compare it with
    }
    rows = study_report.failures_table(results).splitlines()
    assert rows[0] == "| failed / run | mnist, m = 4 |"
    assert {"| for_steps | 1 / 2 |", "| by_angle | 1 / 1 |", "| none | - |"} <= set(rows)
    (row,) = study_report.defaults_table(results).splitlines()[2:]
    assert row == (
        "| mnist | sgd 0.1 relu float32 | 3.0 ± 1.4; 50.0 ± 0.0 | 8.0 ± 0.1; 12.5 ± 3.5 "
        "| 3.0 ± 0.0; 25.0 ± 0.0 | 4.0 / 2.0 |"
    )
