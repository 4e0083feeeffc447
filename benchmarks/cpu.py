"""Forward + backward on the CPU beside F.cross_entropy(F.linear(x, W), y), which has no margin.

    python -m benchmarks.cpu              measure, print a table, write benchmarks/results/*.json

Times: the two interleaved in one run, in alternating order; median and the 20th to 80th percentile.
Memory: peak of torch's allocations during one step, above inputs and the two gradients. Errors:
relative, of the loss and the worse gradient, against the float64 reference on the same inputs (on
the first classes only where C is large).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import lsoftmax
from lsoftmax import functional, reference

SHAPES = [(256, 512, 10), (256, 512, 10_000), (128, 512, 100_000), (512, 64, 100_000)]
MARGIN, LAM = 4, 5.0
ERROR_CLASSES = 10_000


def inputs(n: int, d: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, d).requires_grad_()
    w = (torch.randn(c, d) / d**0.5).requires_grad_()
    return x, w, torch.randint(c, (n,))


def ours(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return functional.lsoftmax_loss(x, w, y, MARGIN, LAM)


def plain(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def gemm3(x: Tensor, w: Tensor, e: Tensor) -> None:
    """The three matrix products alone: what no implementation does without."""
    with torch.no_grad():
        torch.mm(x, w.t(), out=e), torch.mm(e, w), torch.mm(e.t(), x)


def step(loss: Callable, x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(x, w, y), (x, w))


def seconds(losses: dict[str, Callable], tensors: tuple, budget: float) -> dict[str, list[float]]:
    """Times of every loss, interleaved, for about `budget` seconds and at least 7 rounds each."""
    times: dict[str, list[float]] = {name: [] for name in losses}
    for loss in losses.values():
        for _ in range(3):
            step(loss, *tensors)
    start = time.perf_counter()
    order = list(losses)
    while time.perf_counter() - start < budget or len(times["ours"]) < 7:
        for name in order:
            times[name].append(_timed(lambda loss=losses[name]: step(loss, *tensors)))
        order.reverse()
    return times


def peak_bytes(loss: Callable, x: Tensor, w: Tensor, y: Tensor) -> int:
    """Largest sum of torch's allocations in one step, less the two gradients."""
    step(loss, x, w, y)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step(loss, x, w, y)
    held = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - (x.numel() + w.numel()) * x.element_size()


def errors(x: Tensor, w: Tensor, y: Tensor) -> tuple[float, float]:
    w, y = w[:ERROR_CLASSES].detach(), y % min(ERROR_CLASSES, w.shape[0])
    narrow = [t.detach().clone().requires_grad_() for t in (x, w)]
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    loss = functional.lsoftmax_loss(*narrow, y, MARGIN, LAM)
    truth = reference.lsoftmax_loss(*wide, y, MARGIN, LAM)
    pairs = zip(torch.autograd.grad(loss, narrow), torch.autograd.grad(truth, wide), strict=True)
    gradient = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return float((loss.double() - truth).abs() / truth), gradient


def measure(shape: tuple[int, int, int], budget: float) -> dict:
    torch.manual_seed(0)
    tensors = inputs(*shape)
    losses = {"ours": ours, "plain": plain}
    row: dict = {"shape": shape}
    with torch.no_grad():
        e = torch.empty(shape[0], shape[2])
        products = [_timed(lambda: gemm3(*tensors[:2], e)) for _ in range(15)]
    row["gemm3_ms"] = statistics.median(products) * 1e3
    for name, times in seconds(losses, tensors, budget).items():
        p20, p50, p80 = (statistics.quantiles(times, n=10)[k] for k in (1, 4, 7))
        row[name] = {"ms": p50 * 1e3, "ms_20": p20 * 1e3, "ms_80": p80 * 1e3, "runs": len(times)}
        row[name]["peak_mb"] = peak_bytes(losses[name], *tensors) / 1e6
    row["time_ratio"] = row["ours"]["ms"] / row["plain"]["ms"]
    row["gemm3_ratio"] = row["gemm3_ms"] / row["plain"]["ms"]
    row["loss_error"], row["gradient_error"] = errors(*tensors)
    return row


def _timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = [line for line in lines if line.startswith("model name")]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lsoftmax": lsoftmax.__version__,
        "commit": git.stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_before": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10, help="per shape")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": machine(), "command": f"python -m benchmarks.cpu --threads {args.threads}"}
    result |= {"margin": MARGIN, "lam": LAM, "dtype": "float32", "rows": []}
    heads = ("N, D, C", "ours, ms", "plain, ms", "ratio", "gemm3, ms")
    heads += ("peak MB: ours", "plain", "error: loss", "gradient")
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for shape in SHAPES:
        row = measure(shape, args.seconds)
        result["rows"].append(row)
        a, b = row["ours"], row["plain"]
        print(
            f"| {', '.join(map(str, shape))} | {a['ms']:.3g} ({a['ms_20']:.3g}-{a['ms_80']:.3g}) "
            f"| {b['ms']:.3g} ({b['ms_20']:.3g}-{b['ms_80']:.3g}) | {row['time_ratio']:.2f} "
            f"| {row['gemm3_ms']:.3g} "
            f"| {a['peak_mb']:.2f} | {b['peak_mb']:.2f} "
            f"| {row['loss_error']:.0e} | {row['gradient_error']:.0e} |",
            flush=True,
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(args.output)


if __name__ == "__main__":
    main()
