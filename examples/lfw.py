"""LFW: tell faces of unseen people apart: python examples/lfw.py --data FOLDER.

There is no other data. Each of LFW's ten folds of 600 pairs is tested by a network that was trained
on the people who are in none of its pairs; the threshold comes from the other nine folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lsoftmax
import networks
from augment import move
from data import MissingDataError
from experiment import Row, Setting, authors
from options import add_sample_rate, arguments_of, device_of, positive
from pairs import lfw
from recognition import compare
from training import Recipe

SETTINGS = {
    "default": Setting(
        Recipe(40),
        partial(networks.small, widths=(16, 32, 64, 128)),
        128,
        lsoftmax.LambdaSchedule.for_steps,
    ),
    # For two cores: at 32 x 32 pixels.
    "small": Setting(
        Recipe(20),
        partial(networks.small, widths=(16, 32, 64, 128), pool=2),
        128,
        lsoftmax.LambdaSchedule.for_steps,
    ),
    # A network of the authors' kind; theirs for faces was trained on half a million others.
    "paper": Setting(
        Recipe(150, drops=(5000, 7500)),
        partial(networks.paper, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2)),
        512,
        authors(gamma=2e-5, power=45.0),
    ),
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = arguments_of("lfw", "Verify unseen people of LFW, trained on LFW alone.", SETTINGS)
    parser.add_argument("--folds", type=positive, default=10, help="of the ten (%(default)s)")
    parser.add_argument(
        "--least", type=positive, default=2, help="images of a person to train on (%(default)s)"
    )
    add_sample_rate(parser)
    args = parser.parse_args(arguments)
    args.device = device_of(args.device, parser)
    if args.folds > 10:
        parser.error(f"--folds {args.folds}: LFW has ten")
    try:
        data = lfw(args.data)
    except MissingDataError as error:
        parser.error(str(error))
    return compare(
        args,
        data,
        SETTINGS[args.recipe],
        folds=args.folds,
        least=args.least,
        augment=partial(move, flip=True),
    )


if __name__ == "__main__":
    main()
