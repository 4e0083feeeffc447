"""What is measured: shapes, types and margins, and the inputs drawn for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

Shape = tuple[int, int, int]  # N rows, D features, C classes

GPU_SHAPES: list[Shape] = [
    (512, 2, 10),
    (256, 512, 10),
    (128, 4096, 1000),
    (256, 512, 10_000),
    (1024, 512, 100_000),
    (16384, 512, 100_000),
    (4096, 512, 1_000_000),
    (4096, 128, 1_000_000),
]
GPU_FIRST = [(16384, 512, 100_000), (4096, 512, 1_000_000), (1024, 512, 100_000)]
GPU_SERIES: list[Shape] = [
    *((1024, 128, 10**k) for k in range(3, 8)),
    *((n, 512, 100_000) for n in (256, 1024, 4096, 16384, 65536)),
]

# For two cores, where a step of the largest takes a second.
CPU_SHAPES: list[Shape] = [
    (512, 2, 10),
    (256, 512, 10),
    (256, 512, 10_000),
    (128, 512, 100_000),
    (512, 64, 100_000),
]
CPU_SERIES: list[Shape] = [
    *((64, 64, 10**k) for k in range(3, 7)),
    *((n, 64, 10_000) for n in (64, 256, 1024, 4096)),
]

GPU_TYPES = ["bfloat16", "float32", "float16"]
CPU_TYPES = ["float32"]
MARGINS = [4, 1]


@dataclass(frozen=True)
class Case:
    """One measurement: every provider sees the same inputs of one shape and type."""

    n: int
    d: int
    c: int
    dtype: str
    margin: int

    @property
    def shape(self) -> Shape:
        return self.n, self.d, self.c

    def __str__(self) -> str:
        return f"({self.n}, {self.d}, {self.c}) {self.dtype} m={self.margin}"

    def as_dict(self) -> dict:
        return asdict(self)


def standard_cases(
    device_type: str,
    quick: bool,
    shapes: Sequence[Shape] | None = None,
    types: Sequence[str] | None = None,
    margins: Sequence[int] | None = None,
) -> list[Case]:
    """The cases of a run. What is named replaces the standard; the series need nothing named.

    Quick: the standard shapes in the first type at the first margin, without the series; those
    first that there are figures to reach for, since there is little time.
    """
    on_gpu = device_type == "cuda"
    first = 1 if quick else None
    all_types = types or (GPU_TYPES if on_gpu else CPU_TYPES)[:first]
    all_margins = margins or MARGINS[:first]
    standard = shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    cases = [Case(*s, dtype, m) for s in standard for dtype in all_types for m in all_margins]
    if not (quick or shapes):
        series = GPU_SERIES if on_gpu else CPU_SERIES
        cases += [Case(*s, all_types[0], all_margins[0]) for s in series]
    if quick and not shapes:
        cases.sort(key=lambda case: case.shape not in GPU_FIRST)
    return list(dict.fromkeys(cases))


def draw(case: Case, device: torch.device, deviation: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D), class vectors (C, D), targets (N,): the same for one case in every run.

    Logits are normal, with a mean of 0 and this deviation. Features and class vectors want
    gradients.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.n, case.d, generator=generator, device=device).mul_(deviation)
    w = torch.randn(case.c, case.d, generator=generator, device=device).mul_(case.d**-0.5)
    y = torch.randint(case.c, (case.n,), generator=generator, device=device)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y


def gradient_scale(case: Case) -> float:
    """What the loss is multiplied by before its backward: 1, and for float16 what a scaler would.

    A gradient of p / N would be 0 in float16 for everyone.
    """
    return float(min(16 * case.n, 2**15)) if case.dtype == "float16" else 1.0
