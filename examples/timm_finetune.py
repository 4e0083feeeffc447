"""timm: a network of its zoo as body, and the layer for head, on scikit-learn's digits. Under a
minute on a CPU. With ``pretrained=True`` timm would download weights to fine-tune.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import lsoftmax
from extras import needed

with needed("ecosystem"):
    import timm
    from sklearn.datasets import load_digits


def main(epochs: int = 8, network: str = "test_resnet") -> float:
    """Trains and returns the test accuracy. Any network of the zoo will do; this is a tiny one."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    images = F.interpolate(images, size=32, mode="bilinear")
    train, test = random_split(TensorDataset(images, torch.from_numpy(digits.target)), [1297, 500])
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

    body = timm.create_model(network, pretrained=False, in_chans=1, num_classes=0)  # features
    schedule = lsoftmax.LambdaSchedule.for_steps(epochs * len(loader))
    head = lsoftmax.LSoftmaxLoss(body.num_features, 10, margin=4, lam=schedule)
    groups = [  # weight decay for the body only
        {"params": body.parameters(), "weight_decay": 0.05},
        {"params": head.parameters(), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    for _ in range(epochs):
        for batch, labels in loader:
            optimizer.zero_grad()
            head(body(batch), labels).backward()
            optimizer.step()

    body.eval()
    images, labels = next(iter(DataLoader(test, batch_size=500)))
    with torch.no_grad():
        return float((head.linear(body(images)).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    print(f"test accuracy: {main():.3f}")
