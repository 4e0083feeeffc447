"""PyTorch Lightning: the layer in a LightningModule, on scikit-learn's digits. Under a minute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lsoftmax
from extras import needed

with needed("ecosystem"):
    import lightning
    from sklearn.datasets import load_digits


class Digits(lightning.LightningModule):
    """Body and head; the schedule's buffers are in Lightning's checkpoints like any other."""

    def __init__(self, steps: int, margin: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.PReLU())
        schedule = lsoftmax.LambdaSchedule.for_steps(steps)
        self.head = lsoftmax.LSoftmaxLoss(64, 10, margin, lam=schedule)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = self.head(self.body(images), labels)
        self.log("lam", self.head.lam)
        return loss

    def test_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        right = self.head.linear(self.body(images)).argmax(1) == labels
        self.log("accuracy", right.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(epochs: int = 20, folder: str | None = None) -> dict[str, float]:
    """Trains, tests and returns what Lightning logged; ``folder`` is for its checkpoints."""
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
    train, test = random_split(TensorDataset(images, labels), [1297, 500])
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        accelerator="auto",
        default_root_dir=folder,
        enable_checkpointing=folder is not None,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=epochs,
    )
    model = Digits(steps=epochs * len(loader))
    trainer.fit(model, loader)
    lam = trainer.callback_metrics["lam"].item()
    (logged,) = trainer.test(model, DataLoader(test, batch_size=500), verbose=False)
    return {"lam": lam, **logged}


if __name__ == "__main__":
    print(main())
