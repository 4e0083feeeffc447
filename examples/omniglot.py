"""Omniglot: tell drawings of unseen characters apart: python examples/omniglot.py --data FOLDER.

Trained to classify the 964 characters of images_background; tested on pairs of drawings from
alphabets it has not seen, by the cosine of their features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lsoftmax
import networks
from augment import move
from data import MissingDataError
from experiment import Row, Setting
from options import add_sample_rate, arguments_of, device_of
from pairs import omniglot
from recognition import compare
from training import Recipe

SETTINGS = {
    "default": Setting(
        Recipe(20),
        partial(networks.small, widths=(16, 32, 64)),
        128,
        lsoftmax.LambdaSchedule.for_steps,
    ),
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = arguments_of("omniglot", "Verify unseen characters of Omniglot.", SETTINGS)
    add_sample_rate(parser)
    args = parser.parse_args(arguments)
    args.device = device_of(args.device, parser)
    try:
        data = omniglot(args.data)
    except MissingDataError as error:
        parser.error(str(error))
    return compare(args, data, SETTINGS[args.recipe], augment=partial(move, pixels=3, flip=False))


if __name__ == "__main__":
    main()
