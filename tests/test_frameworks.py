"""The layer in other libraries: their examples, run as a user runs them, but shorter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from ecosystem import needed

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def test_lightning(tmp_path: Path) -> None:
    """Trained, annealed, and in Lightning's own checkpoint."""
    needed("lightning")
    needed("sklearn")
    import lightning_digits

    figures = lightning_digits.main(epochs=8, folder=str(tmp_path))
    assert figures["accuracy"] > 0.85
    assert figures["lam"] < 100
    (path,) = tmp_path.rglob("*.ckpt")
    restored = lightning_digits.Digits.load_from_checkpoint(path, steps=1, map_location="cpu")
    assert float(restored.head.lam) == pytest.approx(figures["lam"])
    assert restored.head.schedule.steps == 8 * 20


def test_timm() -> None:
    for name in ("timm", "torchvision", "sklearn"):
        needed(name)
    import timm_finetune

    assert timm_finetune.main(epochs=3) > 0.6


@pytest.mark.parametrize("network", ["test_vit", "test_convnext"])
def test_other_networks_of_timm(network: str) -> None:
    """One step through bodies of other kinds: features of their size, and gradients everywhere."""
    timm = needed("timm")
    import lsoftmax

    body = timm.create_model(network, pretrained=False, num_classes=0)
    head = lsoftmax.LSoftmaxLoss(body.num_features, 7)
    size = body.pretrained_cfg["input_size"]
    head(body(torch.randn(2, *size)), torch.tensor([0, 6])).backward()
    parameters = [*body.parameters(), *head.parameters()]
    assert all(each.grad is not None and each.grad.isfinite().all() for each in parameters)


def test_transformers(tmp_path: Path) -> None:
    """As docs/ecosystem.md has it: a checkpoint of the body alone begins the annealing, one of all
    goes on. Red where junk for a schedule's numbers trains.
    """
    needed("transformers.PreTrainedModel")
    import transformers

    import lsoftmax

    class Body(transformers.PreTrainedModel):
        config_class = transformers.ViTConfig

        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.body = torch.nn.Linear(6, 8)
            self.post_init()

    class Careless(Body):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            lam = lsoftmax.LambdaSchedule(10.0, 0.5, 2.0, keep=None)
            self.head = lsoftmax.LSoftmaxLoss(8, 5, margin=3, lam=lam)
            self.post_init()

    class Careful(Careless):
        def _init_weights(self, module: torch.nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, lsoftmax.LambdaSchedule):
                module.reset_parameters()

    x, y = torch.randn(16, 6), torch.randint(5, (16,))
    body = Body(transformers.ViTConfig())
    body.save_pretrained(tmp_path / "body")
    careless = Careless.from_pretrained(tmp_path / "body")
    with pytest.raises(RuntimeError, match="_init_weights"):
        careless.head(careless.body(x), y)
    model = Careful.from_pretrained(tmp_path / "body").train()
    assert torch.equal(model.body.weight, body.body.weight)
    assert model.head.lam == 10
    for _ in range(3):
        model.head(model.body(x), y)
    model.save_pretrained(tmp_path / "all")
    for kind in (Careful, Careless):
        again = kind.from_pretrained(tmp_path / "all").train()
        expected = copy.deepcopy(model)
        assert torch.equal(again.head(again.body(x), y), expected.head(expected.body(x), y))
        assert again.head.schedule.steps == 4
