"""The command line of the examples: its arguments, and those that all experiments have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch

import lsoftmax
from balance import WAYS
from lsoftmax.checks import check_margin
from lsoftmax.sampling import check_sampling


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def margin_of(text: str) -> int:
    """An argument that is a margin."""
    try:
        return check_margin(int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def keep_of(text: str) -> float:
    """An argument that is a schedule's ``keep``."""
    try:
        keep = float(text)
        lsoftmax.LambdaSchedule.by_angle(keep=keep)  # which says what is wrong with it
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return keep


def norm_of(text: str) -> float:
    """An argument that is a norm."""
    value = float(text)
    if not value > 0:
        raise ValueError
    return value


def ratio_of(text: str) -> float:
    """An argument that is at least 1."""
    value = float(text)
    if not 1 <= value < math.inf:
        raise ValueError
    return value


def rate_of(text: str) -> float:
    """An argument that is a ``sample_rate``."""
    try:
        rate = float(text)
        check_sampling(rate, seed=0, label_smoothing=0.0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return rate


def device_of(text: str, parser: argparse.ArgumentParser) -> torch.device:
    """The device of this name, or the parser's error."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {text}: {str(error).splitlines()[0]}")


def backend_of(device: torch.device) -> str:
    """Of a process group on the device. With gloo beside NCCL the host need not wait for the GPU to
    know the size of a batch.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def arguments_of(name: str, description: str, settings: Iterable[str]) -> argparse.ArgumentParser:
    """The arguments that all experiments have."""
    parser = argparse.ArgumentParser(
        description=description, epilog="A run that was interrupted goes on with the same command."
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--data", type=Path, default=Path("data"), help="folder of the data (%(default)s)")
    add("--recipe", choices=list(settings), default="default", help="how to train (%(default)s)")
    add("--margins", type=margin_of, nargs="+", default=[1, 2, 3, 4], help="1 is softmax (1 2 3 4)")
    add("--seeds", type=positive, default=3, help="trainings a margin (%(default)s)")
    add("--epochs", type=positive, help="instead of the recipe's")
    add("--clip", type=norm_of, help="the norm that gradients are cut down to (no clipping)")
    add("--balance", choices=WAYS, help="of classes of unequal size (none)")
    add("--keep", type=keep_of, help="of lam's schedule, instead of the recipe's")
    add("--by-class", action="store_true", help="lam's keep counts classes, not rows, alike")
    add("--device", default=device, help="cpu, cuda, cuda:1 and so on (%(default)s)")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add(
        "--output",
        type=Path,
        default=Path("build/experiments") / name,
        help="folder for results, pictures and checkpoints (%(default)s)",
    )
    return parser


def add_sample_rate(parser: argparse.ArgumentParser) -> None:
    """The argument of experiments with many classes."""
    parser.add_argument(
        "--sample-rate",
        type=rate_of,
        default=1.0,
        help="share of the classes in a step, see lsoftmax.distributed (all)",
    )
