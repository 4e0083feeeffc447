"""Class-parallel L-Softmax behind a data-parallel network, and the same training in one process.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py

Trains on scikit-learn's digits, or with ``--data FOLDER`` on MNIST: every process has its rows of
each batch and its share of the classes. Then the first process trains alone, on the same batches,
and both results are printed. On GPUs where there is one for each process, else on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lsoftmax
from data import Labelled, MissingDataError, mnist
from extras import needed
from lsoftmax.distributed import ClassParallelLSoftmaxLoss, clip_grad_norm_
from options import backend_of, positive

with needed():
    from tqdm import tqdm

    from digits import load_data

FEATURES, BATCH, MARGIN = 16, 128, 4
RATE = 0.02  # of learning, falling to 0


def build_network(images: Tensor) -> nn.Module:
    """Images to features. No batch normalisation, which would see another batch on every process,
    and no kinks, which would magnify differences of rounding to other results.
    """
    pixels = images[0].numel()
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(pixels, 128), nn.LayerNorm(128), nn.SiLU()),
        *(nn.Linear(128, 64), nn.LayerNorm(64), nn.SiLU()),
        nn.Linear(64, FEATURES),
    )


class Run:
    """A training on ``processes`` processes, of which this is number ``rank``."""

    def __init__(
        self,
        data: Labelled,
        epochs: int,
        seed: int,
        device: torch.device,
        rank: int,
        processes: int,
    ) -> None:
        self.data, self.epochs, self.seed, self.epoch = data, epochs, seed, 0
        self.rank, self.processes = rank, processes
        steps = epochs * (len(data.train_labels) // BATCH)
        torch.manual_seed(seed)  # the same weights everywhere
        network = build_network(data.train_images).to(device)
        # The two lines that differ from a training in one process:
        kind = ClassParallelLSoftmaxLoss if processes > 1 else lsoftmax.LSoftmaxLoss
        self.network = DistributedDataParallel(network) if processes > 1 else network
        self.criterion = kind(
            FEATURES,
            data.classes,
            MARGIN,
            lam=lsoftmax.LambdaSchedule.for_steps(steps),
            device=device,
        )
        # Groups of their own: an optimizer may treat the parameters of a group as one list.
        groups = [{"params": list(m.parameters())} for m in (self.network, self.criterion)]
        self.optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, weight_decay=5e-4)

    def run_epoch(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.data.train_labels), generator=generator)
        batches = order[: len(order) // BATCH * BATCH].split(BATCH)
        for number, batch in enumerate(batches):
            done = (self.epoch + number / len(batches)) / self.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
            mine = batch.tensor_split(self.processes)[self.rank]
            self.optimizer.zero_grad()
            features = self.network(self.data.train_images[mine])
            self.criterion(features, self.data.train_labels[mine]).backward()
            clip_grad_norm_([*self.network.parameters(), *self.criterion.parameters()], 5.0)
            self.optimizer.step()
        self.epoch += 1

    def class_vectors(self) -> Tensor:
        """All of W, (C, D); every process must ask for it."""
        w = self.criterion.linear.weight.detach()
        return w.full_tensor() if isinstance(w, DTensor) else w

    @torch.no_grad()
    def test_error(self) -> float:
        """In %, by plain logits."""
        logits = self.network(self.data.test_images) @ self.class_vectors().t()
        predicted = logits.argmax(1)
        return 100 * (predicted != self.data.test_labels).double().mean().item()

    def train(self, checkpoints: Path | None, shown: bool) -> None:
        """To the end; with a folder, from the last checkpoint of such a training in it."""
        if checkpoints is not None:
            images = "x".join(map(str, self.data.train_images.shape))
            checkpoints /= f"epochs-{self.epochs}-seed-{self.seed}-images-{images}"
            self._load(checkpoints)
        bar = tqdm(total=self.epochs, initial=self.epoch, unit="epoch", disable=not shown)
        with bar:
            while self.epoch < self.epochs:
                self.run_epoch()
                if checkpoints is not None:
                    self._save(checkpoints)
                bar.update()

    def _state(self) -> dict[str, object]:
        whole = nn.ModuleDict({"network": self.network, "criterion": self.criterion})
        model, optimizer = get_state_dict(whole, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def _save(self, folder: Path) -> None:
        """Under another name until it is whole: whoever dies when, the last one can be loaded."""
        written = folder / f"epoch-{self.epoch:04d}"
        temporary = folder / f".{written.name}"
        dcp.save(self._state(), checkpoint_id=temporary)
        if self.rank == 0:
            temporary.rename(written)
            for older in sorted(folder.glob("epoch-*"))[:-2]:
                shutil.rmtree(older)

    def _load(self, folder: Path) -> None:
        """The last checkpoint."""
        saved = sorted(folder.glob("epoch-*"))  # the first is saved after all have looked
        if self.rank == 0:
            for partial in folder.glob(".epoch-*"):
                shutil.rmtree(partial)
        if not saved:
            return
        state = self._state()
        dcp.load(state, checkpoint_id=saved[-1])
        whole = nn.ModuleDict({"network": self.network, "criterion": self.criterion})
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(whole, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.epoch = int(saved[-1].name.removeprefix("epoch-"))


def floats(folder: Path) -> Labelled:
    """MNIST with pixels in [0, 1]."""
    data = mnist(folder)
    train, test = data.train_images.float() / 255, data.test_images.float() / 255
    return Labelled(train, data.train_labels, test, data.test_labels, data.classes)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train with the classes spread over processes, and in one process.",
        epilog="Start it with torchrun --standalone --nproc-per-node 2 examples/distributed.py",
    )
    add = parser.add_argument
    add("--epochs", type=positive, default=30, help="(%(default)s)")
    add("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    add("--data", type=Path, help="folder of MNIST; without it, scikit-learn's digits")
    add("--checkpoints", type=Path, help="folder to save every epoch in, and to go on from")
    add("--timeout", type=positive, default=120, help="seconds for a process that hangs (120)")
    args = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error(f"{parser.epilog}")
    try:
        args.labelled = load_data(torch.device("cpu")) if args.data is None else floats(args.data)
    except MissingDataError as error:
        parser.error(str(error))
    if args.checkpoints is not None:
        args.checkpoints.mkdir(parents=True, exist_ok=True)
    return args


def device_of_process() -> torch.device:
    """A GPU of its own, or the CPU."""
    if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)
    device = device_of_process()
    dist.init_process_group(backend_of(device), timeout=timedelta(seconds=args.timeout))
    rank, processes = dist.get_rank(), dist.get_world_size()
    settings = (args.labelled.to(device), args.epochs, args.seed, device)

    together = Run(*settings, rank, processes)
    together.train(args.checkpoints, shown=rank == 0)
    error, w = together.test_error(), together.class_vectors().cpu()
    dist.barrier()
    # Before one trains alone: the others would wait, and not for ever. And no network may hold the
    # group any more: gloo's threads, alive when Python ends, end the process with an abort.
    del together
    gc.collect()
    dist.destroy_process_group()
    if rank == 0:
        print(f"{processes} processes: test error {error:.2f}%", flush=True)
        alone = Run(*settings, 0, 1)
        alone.train(None, shown=True)
        print(f"one process: test error {alone.test_error():.2f}%")
        difference = (alone.class_vectors().cpu() - w).abs().max().item()
        print(f"Largest difference of an element of W: {difference:.1g}", flush=True)


if __name__ == "__main__":
    main()
