"""The examples' training loop, which resumes to the bit, and what keeps its results."""
# ruff: noqa: E402

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the examples need {package}")

import augment
import experiment
import files
import lsoftmax
import networks
import options
import sampled
import training

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- training ------------------------------------------------------------------------------------


def images_and_labels(count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (N, 1, 8, 8) of four classes that a small network can tell apart."""
    generator = torch.Generator().manual_seed(1)
    shapes = torch.randint(0, 150, (4, 1, 8, 8), generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randint(0, 100, (count, 1, 8, 8), generator=generator)
    return (shapes[labels] + noise).to(torch.uint8), labels


SETTING = experiment.Setting(
    training.Recipe(4, batch=32, lr=0.05), networks.small, 8, lsoftmax.LambdaSchedule.for_steps
)


class Dropping(nn.Module):
    """A network that draws random numbers of its own, from torch's global state."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.body(images), 0.2, self.training)


def prepared(
    device: str, margin: int = 4, seed: int = 3, classes: int = 4, **options
) -> training.Training:
    images, labels = (t.to(device) for t in images_and_labels())
    begun = experiment.prepare(SETTING, images, labels, classes, margin, seed, **options)
    begun.network = Dropping(begun.network)
    return begun


def weights(trained: training.Training) -> dict[str, torch.Tensor]:
    state = {**trained.network.state_dict(), **trained.criterion.state_dict()}
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state.items()
    }


class KilledError(Exception):
    """What stands for a kill."""


@pytest.fixture
def one_process(device):
    with sampled.group_of_one(torch.device(device)):
        yield


@pytest.mark.parametrize(
    "options", [{"amp": False}, {"amp": True}, {"classes": 60, "sample_rate": 0.6}], ids=str
)
@pytest.mark.usefixtures("one_process")
def test_a_killed_training_goes_on_to_the_same_bits(device, tmp_path, options):
    """Red if anything that the next epoch depends on is not in the checkpoint: momentum, learning
    rate, lam, the order of the data, the augmentation's and the network's own random numbers, the
    sample of the classes.
    """
    options = {**options, "augment": lambda x, g: augment.move(x, g, pixels=1, flip=True)}
    straight = prepared(device, **options).run()
    checkpoint, logs = tmp_path / "run.pt", []

    def kill(log: training.Log) -> None:
        if log["epoch"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        prepared(device, **options).run(kill, checkpoint)
    torch.manual_seed(0)  # another process knows nothing of this one
    resumed = prepared(device, seed=3, **options).run(logs.append, checkpoint)

    for (name, one), two in zip(weights(straight).items(), weights(resumed).values(), strict=True):
        assert torch.equal(one, two), name
    assert resumed.history == straight.history == logs
    assert [log["epoch"] for log in logs] == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [checkpoint], "a temporary file was left"


@pytest.mark.usefixtures("one_process")
def test_a_share_of_the_classes(device):
    """The same loss, but for the classes that are not drawn. Red if all are, or if class vectors or
    schedule begin anew.
    """
    whole, part = (prepared(device, classes=60, sample_rate=rate).criterion for rate in (1.0, 0.6))
    features = torch.randn(16, 8, device=device)
    labels = torch.arange(16, device=device)
    assert part(features, labels) < whole(features, labels)
    assert part.schedule.extra_repr() == whole.schedule.extra_repr()
    assert part.schedule.steps == 1
    torch.testing.assert_close(part.eval()(features, labels), whole.eval()(features, labels))


def test_margins_train_alike_but_for_the_loss(device):
    """As lam grows every margin is softmax. Red if initial weights, batches, augmentation or
    learning rates depend on the margin.
    """
    setting = experiment.Setting(
        SETTING.recipe, networks.small, 8, lambda steps: lsoftmax.LambdaSchedule(1e12, 0.0, 0.0)
    )
    images, labels = (t.to(device) for t in images_and_labels())

    def weight(margin: int) -> torch.Tensor:
        trained = experiment.prepare(setting, images, labels, 4, margin, seed=5).run()
        return trained.criterion.linear.weight

    torch.testing.assert_close(weight(4), weight(1), rtol=1e-3, atol=1e-3)


def test_learning_rates(device):
    """One cycle, or the authors' steps. Red if they are counted in anything but steps."""
    images, labels = images_and_labels(128)
    rates: dict[tuple, list[float]] = {}
    for drops in ((), (3, 6)):
        recipe = training.Recipe(2, batch=32, lr=0.5, drops=drops)
        network = networks.small(images, 8)
        head = lsoftmax.LSoftmaxLoss(8, 4)
        begun = training.Training(network, head, images, labels, recipe, 0)
        step, taken = begun.scheduler.step, rates.setdefault(drops, [])

        def noting(begun=begun, step=step, taken=taken) -> None:
            taken.append(begun.optimizer.param_groups[0]["lr"])
            step()

        begun.scheduler.step = noting
        begun.run()
    assert rates[3, 6] == pytest.approx([0.5] * 3 + [0.05] * 3 + [0.005] * 2)
    cycle = rates[()]
    assert len(cycle) == 8
    assert max(cycle) == pytest.approx(0.5, rel=0.06)
    assert cycle[0] < 0.1 or cycle.index(max(cycle)) <= 1
    assert cycle[-1] < 0.01


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match="one batch of 128 images, got 100"):
        training.Recipe(1).steps(100)


def test_collapse_is_shown(tmp_path, capsys):
    """Red if a training whose classes are lost ends without a word."""
    images, labels = images_and_labels()
    setting = experiment.Setting(
        training.Recipe(2, batch=32, lr=0.01),
        networks.small,
        8,
        lambda steps: lsoftmax.LambdaSchedule.constant(5.0),
    )

    def train(run, checkpoint, after_epoch):
        begun = experiment.prepare(setting, images, labels, 4, **run)
        begun.criterion.linear.weight.requires_grad_(run["margin"] == 1)
        begun.criterion.linear.weight.data[1] *= run["margin"] == 1
        return experiment.figures_of(begun.run(after_epoch, checkpoint))

    runs = [{"margin": 1, "seed": 0}, {"margin": 4, "seed": 0}]
    well, ill = experiment.run_all(experiment.Results(tmp_path, {}), runs, 2, train)
    assert well["warning"] is None
    assert "1 class vector(s) have shrunk" in ill["warning"]
    shown = "".join(capsys.readouterr())
    assert "m = 4, seed 0: epoch 1: Training is collapsing" in shown
    assert "softmax, seed 0: epoch 1: Training" not in shown


# ---- results -------------------------------------------------------------------------------------


def test_results_of_other_settings_are_not_mixed(tmp_path):
    experiment.Results(tmp_path, {"epochs": 3}).add({"margin": 1, "seed": 0}, {"test_error": 1.0})
    again = experiment.Results(tmp_path, {"epochs": 3})
    assert again.find({"margin": 1, "seed": 0}) == {"margin": 1, "seed": 0, "test_error": 1.0}
    assert again.find({"margin": 1, "seed": 1}) is None
    with pytest.raises(SystemExit, match=r"(?s)other settings.*3.*4.*--output"):
        experiment.Results(tmp_path, {"epochs": 4})


def test_settings_of_trainings_that_differ():
    """Each fold has other images, and with them another number of steps."""
    parser = options.arguments_of("faces", "", ["default"])
    args = parser.parse_args([])
    settings = experiment.describe(args, SETTING, [(330, 7), (300, 9), (320, 8)], pairs=9)
    assert (settings["train"], settings["pairs"]) == ("300 to 330", 9)
    first, second = (SETTING.schedule(4 * (n // 32)).extra_repr() for n in (300, 330))
    assert settings["schedule"] == f"{first} to {second}"
    alike = experiment.describe(args, SETTING, [(300, 9), (300, 9)])
    assert (alike["train"], alike["schedule"]) == (300, first)
    assert experiment.describe(args, SETTING, [(300, 7), (300, 9)])["train"] == 300


def test_files_that_are_none_of_ours_end_in_words(tmp_path):
    """And stay as they are."""
    path = tmp_path / "results.json"
    for content in ("{", "[]", '{"rows": []}'):
        path.write_text(content)
        with pytest.raises(SystemExit, match=r"results\.json is none of this program's"):
            experiment.Results(tmp_path, {})
        assert path.read_text() == content
    with pytest.raises(SystemExit, match=r"--output .*results\.json"):
        experiment.Results(path, {})
    begun = prepared("cpu")
    for content in (b"", b"PK", b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=r"results\.json is no checkpoint \(.*\): remove it"):
            begun.run(checkpoint=path)
        assert path.read_bytes() == content


def test_interrupted(tmp_path, capsys):
    """Red if Ctrl-C ends in a traceback, or loses the runs before it."""

    def train(run, checkpoint, after_epoch):
        if run["seed"] == 1:
            raise KeyboardInterrupt
        return {"test_error": 1.0}

    results = experiment.Results(tmp_path, {})
    with pytest.raises(SystemExit) as end:
        experiment.run_all(results, [{"margin": 1, "seed": s} for s in (0, 1)], 1, train)
    assert end.value.code == 130
    assert "The same command goes on" in "".join(capsys.readouterr())
    assert len(experiment.Results(tmp_path, {}).rows) == 1


def test_table():
    """Mean and standard deviation over the seeds, of means over the folds."""
    rows = [
        {"margin": 1, "seed": 0, "fold": 0, "error": 1.0},
        {"margin": 1, "seed": 0, "fold": 1, "error": 3.0},
        {"margin": 1, "seed": 1, "fold": 0, "error": 5.0},
        {"margin": 4, "seed": 0, "fold": 0, "error": 0.5},
    ]
    assert experiment.table(rows, {"error": "error, %"}).splitlines() == [
        "| | error, % |",
        "|---|---|",
        "| softmax | 3.50 ± 2.12 |",
        "| L-Softmax, m = 4 | 0.50 |",
    ]


def test_files_are_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    for write in (lambda: files.write(path, b"new"), lambda: files.save(path, {"b": 2})):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space"):
                write()
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, math.nan)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# ---- augmentation --------------------------------------------------------------------------------


def test_move_moves_and_mirrors():
    """Every image is itself shifted, mirrored or not, with 0 from outside; all cases occur."""
    images = torch.arange(1, 7, dtype=torch.uint8).view(1, 1, 2, 3).repeat(400, 1, 1, 1)
    padded = nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    moved = augment.move(images, torch.Generator().manual_seed(0), pixels=1, flip=True)
    cases = {
        tuple(picture[i : i + 2, j : j + 3].reshape(-1).tolist())
        for picture in (padded, padded.flip(1))
        for i in range(3)
        for j in range(3)
    }
    assert {tuple(image.reshape(-1).tolist()) for image in moved} == cases
    still = augment.move(images, torch.Generator().manual_seed(0), pixels=0, flip=False)
    assert torch.equal(still, images)
