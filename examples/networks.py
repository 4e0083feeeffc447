"""The networks of the experiments: images as bytes to features, without a classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "prelu": nn.PReLU}


class Standardise(nn.Module):
    """Images (N, channels, height, width) uint8 to float32 of about mean 0 and deviation 1."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        for name, numbers in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(numbers).view(-1, 1, 1))

    @classmethod
    def of(cls, images: Tensor) -> Standardise:
        """By the mean and deviation of each channel of these images (at most the first 10,000)."""
        pixels = images[:10_000].float()
        return cls(pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist())

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.deviation


def convolution(
    inputs: int, outputs: int, size: int, activation: str = "prelu", *, stride: int = 1
) -> list[nn.Module]:
    """Convolution, batch normalisation, activation."""
    return [
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        ACTIVATIONS[activation](),
    ]


def connected(inputs: int, outputs: int, activation: str = "prelu") -> list[nn.Module]:
    """Fully connected layer, batch normalisation, activation."""
    return [
        nn.Linear(inputs, outputs, bias=False),
        nn.BatchNorm1d(outputs),
        ACTIVATIONS[activation](),
    ]


def small(
    images: Tensor,
    features: int,
    activation: str = "prelu",
    *,
    widths: Sequence[int] = (16, 32),
    pool: int = 1,
) -> nn.Sequential:
    """A few convolutions, nearly all with stride 2, and a fully connected layer: for two cores.

    Args:
        images: of the training set, for their shape, mean and deviation.
        features: D.
        activation: ``"prelu"`` or ``"relu"``.
        widths: channels of the convolutions with stride 2; one without follows.
        pool: the network sees the mean of so many by so many pixels.
    """
    channels, height, width = images.shape[1:]
    layers: list[nn.Module] = [Standardise.of(images)]
    if pool > 1:
        layers.append(nn.AvgPool2d(pool))
        height, width = height // pool, width // pool
    for outputs in widths:
        layers += convolution(channels, outputs, 5, activation, stride=2)
        channels, height, width = outputs, -(-height // 2), -(-width // 2)
    layers += convolution(channels, channels, 3, activation)
    return initialised(
        *layers, nn.Flatten(), *connected(channels * height * width, features, activation)
    )


class Residual(nn.Module):
    """The input, and what two convolutions add to it."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        pair = [convolution(channels, channels, 3, activation) for _ in range(2)]
        self.added = nn.Sequential(*pair[0], *pair[1])

    def forward(self, input: Tensor) -> Tensor:
        return input + self.added(input)


def residual(images: Tensor, features: int, activation: str = "prelu") -> nn.Sequential:
    """Eight convolutions, four of them in two residual blocks: for short training on a GPU."""
    channels = images.shape[1]
    return initialised(
        Standardise.of(images),
        *convolution(channels, 64, 3, activation),
        *convolution(64, 128, 3, activation),
        nn.MaxPool2d(2),
        Residual(128, activation),
        *convolution(128, 256, 3, activation),
        nn.MaxPool2d(2),
        *convolution(256, 256, 3, activation),
        nn.MaxPool2d(2),
        Residual(256, activation),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        *connected(256, features, activation),
    )


def paper(
    images: Tensor,
    features: int,
    activation: str = "relu",
    *,
    widths: Sequence[int],
    depths: Sequence[int],
) -> nn.Sequential:
    """The authors' networks: stages of 3 x 3 convolutions, a maximum over 2 x 2 after each.

    Args:
        images: of the training set, for their shape, mean and deviation.
        features: D.
        activation: ``"prelu"`` or ``"relu"``.
        widths, depths: channels and number of convolutions of each stage.
    """
    channels, height, width = images.shape[1:]
    layers: list[nn.Module] = [Standardise.of(images)]
    for outputs, depth in zip(widths, depths, strict=True):
        for _ in range(depth):
            layers += convolution(channels, outputs, 3, activation)
            channels = outputs
        layers.append(nn.MaxPool2d(2, ceil_mode=True))  # as Caffe rounds
        height, width = -(-height // 2), -(-width // 2)
    return initialised(
        *layers, nn.Flatten(), *connected(channels * height * width, features, activation)
    )


def initialised(*layers: nn.Module) -> nn.Sequential:
    """The layers in a row, with He's initialisation, as the authors train."""
    network = nn.Sequential(*layers)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
    return network
