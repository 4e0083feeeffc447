"""MNIST with softmax and L-Softmax: python examples/mnist.py --data FOLDER.

The default recipe trains a small network in a few minutes on two cores; ``--recipe paper`` is what
the authors trained, on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lsoftmax
import networks
from classification import compare
from data import MissingDataError, mnist
from experiment import Row, Setting, authors
from options import arguments_of, device_of
from training import Recipe

SETTINGS = {
    "default": Setting(Recipe(10), networks.small, 64, lsoftmax.LambdaSchedule.for_steps),
    # 30,000 steps; the authors publish the schedule for m = 4, here it serves all margins.
    "paper": Setting(
        Recipe(64, drops=(5000, 7500, 10000)),
        partial(networks.paper, widths=(64, 128, 256), depths=(4, 3, 3)),
        512,
        authors(gamma=2.5e-5, power=35.0),
    ),
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = arguments_of("mnist", "Compare softmax and L-Softmax on MNIST.", SETTINGS)
    args = parser.parse_args(arguments)
    args.device = device_of(args.device, parser)
    try:
        data = mnist(args.data)
    except MissingDataError as error:
        parser.error(str(error))
    return compare(args, data, SETTINGS[args.recipe])


if __name__ == "__main__":
    main()
