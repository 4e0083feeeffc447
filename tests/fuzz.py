"""Wrong, odd and right arguments for every public entry.

    python fuzz.py --calls 10000 --seed 1   # drawn, some wrong in several arguments
    python fuzz.py --sweep --seed 1         # each odd value once for each argument

Every call must end in a clean Python error, which says what was expected and what came, or in a
right result; and leave nothing behind: after it the same good call gives the same bits, and a
layer whose forward failed has the parameters and the schedule that it had. Prints what happened,
as JSON. A process of its own, so that a crash is seen: see test_fuzz.py.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import functools
import json
import operator
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import lsoftmax
from fuzz_entries import (
    ANY,
    MATRICES,
    ODD,
    C,
    D,
    Entry,
    Forward,
    N,
    entries,
    tensors,
)
from fuzz_judges import WrongError, anything, require
from lsoftmax import functional
from lsoftmax.distributed import ClassParallelLSoftmaxLoss


def is_clean(error: Exception, theirs: tuple[str, ...]) -> bool:
    if theirs == ANY:
        return not isinstance(error, WrongError)
    if not isinstance(error, (TypeError, ValueError, IndexError, RuntimeError)):
        return False
    text = str(error)
    ours = "expected" in text and re.search(r"\bgot\b|out of bounds", text)
    # The kernels', on the device: a target that is no class.
    return bool(ours) or "device-side assert" in text or any(re.search(p, text) for p in theirs)


Case = tuple[Entry, dict[str, Any]]


def drawn(all_entries: list[Entry], calls: int) -> Iterator[Case]:
    for number in range(calls):
        entry = all_entries[number % len(all_entries)]
        values = entry.arguments()
        wrong = min(len(values), random.choice((0, 1, 1, 1, 2, 3)))
        for name in random.sample(list(values), wrong):
            values[name] = random.choice(random.choice((ODD, tensors())))
        yield entry, values


def swept(all_entries: list[Entry]) -> Iterator[Case]:
    """What a draw may miss for long: None for an argument that another one makes needed."""
    for entry in all_entries:
        for name in entry.good:
            for value in (*ODD, *tensors()):
                yield entry, {**entry.arguments(), name: value}


def bounded(entry: Entry, values: dict[str, Any]) -> dict[str, Any]:
    if entry.theirs == ANY and "margin" in values:
        with contextlib.suppress(TypeError):  # the reference would take as many steps
            values["margin"] = min(1000, operator.index(values["margin"]))
    return values


def shown(values: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        is_tensor = isinstance(value, Tensor)
        return f"{value.dtype}{tuple(value.shape)} {value.layout}" if is_tensor else repr(value)

    return ", ".join(f"{name}={one(value)[:60]}" for name, value in values.items())


def fuzz(cases: Callable[[list[Entry]], Iterator[Case]], backend: str) -> dict[str, Any]:
    fixed = torch.randn(N, D, requires_grad=True), torch.randn(C, D), torch.tensor([0, 1, 4, 2])

    def good_call() -> tuple[Tensor, Tensor]:
        loss = functional.lsoftmax_loss(*fixed, 4, 0.3)
        return loss.detach(), torch.autograd.grad(loss, fixed[0])[0]

    expected = good_call()
    distributed = backend == "portable" and dist.is_available()
    if distributed:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    all_entries = entries(distributed)
    batch = {name: MATRICES[name] for name in ("input", "target")}
    heads = [lsoftmax.LSoftmaxLoss(D, C), lsoftmax.LSoftmaxLinear(D, C)]
    if distributed:
        heads.append(ClassParallelLSoftmaxLoss(D, C))
    for head in heads:
        name = f"{type(head).__name__}.forward"
        all_entries.append(Entry(name, Forward(head), batch, anything))

    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    found: list[str] = []
    for entry, odd_values in cases(all_entries):
        values = bounded(entry, odd_values)
        faulthandler.dump_traceback_later(60, exit=True)  # a call that hangs
        outcome = "refused"
        try:
            try:
                result = entry.call(**values)
            except Exception as error:
                # Without a target LSoftmaxLinear is torch's layer, with torch's errors.
                plain = entry.name == "LSoftmaxLinear.forward" and values["target"] is None
                if not is_clean(error, ANY if plain else entry.theirs):
                    raise
                if isinstance(entry.call, Forward):
                    entry.call.assert_untouched()
            else:
                outcome = "right"
                entry.judge(values, result)
            now = good_call()
            require(all(map(torch.equal, now, expected)), "the next call gives something else")
        except Exception as error:
            outcome = "wrong"
            found.append(f"{entry.name}({shown(values)}): {type(error).__name__}: {error}"[:700])
        counts[entry.name][outcome] += 1
    if distributed:
        dist.destroy_process_group()
    arguments = sum(len(entry.good) for entry in all_entries)
    sweep = arguments * (len(ODD) + len(tensors()))
    return {"counts": counts, "found": found, "sweep": sweep}


def main() -> None:
    parser = argparse.ArgumentParser()
    how_many = parser.add_mutually_exclusive_group(required=True)
    how_many.add_argument("--calls", type=int)
    how_many.add_argument("--sweep", action="store_true")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--backend", default="portable")
    args = parser.parse_args()
    faulthandler.enable()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.backend != "portable":
        from emulation import build

        build.load(sanitize=args.backend == "sanitized")
    cases = swept if args.sweep else functools.partial(drawn, calls=args.calls)
    print(json.dumps(fuzz(cases, args.backend)))


if __name__ == "__main__":
    main()
