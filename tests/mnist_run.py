"""examples/mnist.py in a process of its own, for test_kills.py.

In a module apart: a new process imports it by its name, which pytest gives to no test file.
"""

from __future__ import annotations

import os
import sys

import torch

import mnist


def run(options: list[str], output: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    mnist.main([*options, "--output", output])
