"""Everything that a user could pick in place of ours.

Packages that are optional are imported when a loss is bound to its inputs, never before.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .provider import Bound, Provider, UnsupportedError


class Plain(Provider):
    """A loss that has no margin: plain softmax cross-entropy."""

    def computes(self, margin: int, lam: float) -> tuple[int, float]:
        return 1, 0.0


class CrossEntropy(Plain):
    name, arrays, profiled = "F.cross_entropy", 3, True

    def loss(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)


class LinearCrossEntropy(Plain):
    name, arrays = "F.linear_cross_entropy", 2
    package = "a torch that has torch.nn.LinearCrossEntropyOptions"

    def installed(self) -> bool:
        return hasattr(torch.nn, "LinearCrossEntropyOptions")

    def loss(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Tensor:
        # Its documentation: chunks are a gain there, elsewhere the plain path is cheaper.
        chunks = x.shape[0] >= x.shape[1] < w.shape[0]
        options = torch.nn.LinearCrossEntropyOptions() if chunks else None
        return F.linear_cross_entropy(x, w, y, options=options)


class Compiled(Provider):
    """Another provider under torch.compile."""

    slow_start = True

    def __init__(self, inner: Provider) -> None:
        self.inner, self.name, self.arrays = inner, f"{inner.name}, compiled", inner.arrays

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        loss = torch.compile(self.inner.loss, dynamic=False)
        return Bound(lambda: loss(x, w, y, margin, lam), (x, w))

    def computes(self, margin: int, lam: float) -> tuple[int, float]:
        return self.inner.computes(margin, lam)


class Published(Provider):
    """The usual published PyTorch layer, as we rewrote it: not anybody's code, but its way.

    A (D, C) weight, cos(m theta) by the binomial expansion, k by a clamped acos, and the target's
    logits read and written by fancy indices.
    """

    name, arrays, profiled = "published layer (rewritten)", 5, True

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        weight = w.detach().t().contiguous().requires_grad_(w.requires_grad)
        terms = torch.arange(margin // 2 + 1, device=x.device)
        binomial = [(-1) ** j * math.comb(margin, 2 * j) for j in range(margin // 2 + 1)]
        factors = torch.tensor(binomial, dtype=x.dtype, device=x.device)
        rows = torch.arange(len(y), device=x.device)

        def loss() -> Tensor:
            logits = x.matmul(weight)
            target = logits[rows, y]
            norms = weight[:, y].norm(dim=0) * x.norm(dim=1)
            cosine = (target / (norms + 1e-10)).unsqueeze(1)
            powers = cosine ** (margin - 2 * terms) * (1 - cosine**2) ** terms
            with torch.no_grad():
                k = (torch.acos(cosine.clamp(-1, 1)) * margin / math.pi).floor().squeeze(1)
            psi = (1 - 2 * (k % 2)) * (factors * powers).sum(1) - 2 * k
            logits[rows, y] = (norms * psi + lam * target) / (1 + lam)
            return F.cross_entropy(logits, y)

        return Bound(loss, (x, weight), transposed=True)


class MetricLearning(Provider):
    """LargeMarginSoftmaxLoss of pytorch-metric-learning. It has no annealing: lam is 0."""

    name, arrays = "pytorch-metric-learning", 12
    requires, package = "pytorch_metric_learning", "pytorch-metric-learning"

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        from pytorch_metric_learning.losses import LargeMarginSoftmaxLoss

        layer = LargeMarginSoftmaxLoss(1, 1, margin=margin)  # its random weights are not needed
        layer.num_classes = w.shape[0]
        weight = w.detach().t().contiguous()
        layer.W = torch.nn.Parameter(weight, requires_grad=w.requires_grad)
        return Bound(partial(layer, x, y), (x, layer.W), transposed=True)

    def computes(self, margin: int, lam: float) -> tuple[int, float]:
        return margin, 0.0


class Liger(Plain):
    """In Triton, as it comes."""

    name, cuda_only = "liger-kernel", True
    requires, package = "liger_kernel", "liger-kernel"

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return Bound(partial(LigerFusedLinearCrossEntropyLoss(), w, x, y), (x, w))


class LigerHopper(Plain):
    """Its kernels for Hopper, which it does not choose by itself."""

    name, cuda_only, slow_start = "liger-kernel, CuTe for Hopper", True, True
    requires, package = "cutlass", "liger-kernel[cutedsl]"
    types = ("bfloat16",)

    def installed(self) -> bool:
        return super().installed() and Liger().installed()

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as hopper

        if x.shape[0] % 128 or w.shape[0] % 256:
            raise UnsupportedError("takes rows in multiples of 128, classes of 256")
        return Bound(partial(hopper.liger_fused_linear_cross_entropy_sm90, x, w, y), (x, w))


class CutCrossEntropy(Plain):
    """By default it leaves out gradients below a threshold; `exact` has it leave out none."""

    cuda_only = True
    requires, package = "cut_cross_entropy", "cut-cross-entropy"
    types = ("float16", "bfloat16")

    def __init__(self, name: str, exact: bool) -> None:
        self.name, self.options = name, {"filter_eps": None} if exact else {}

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        from cut_cross_entropy import linear_cross_entropy

        return Bound(partial(linear_cross_entropy, x, w, y, **self.options), (x, w))


class Quack(Plain):
    """Chunked where the shape allows it, as its own layer chooses; it tunes itself at the start."""

    name, cuda_only, slow_start = "quack-kernels", True, True
    requires, package = "quack", "quack-kernels"
    types = ("float32", "float16", "bfloat16")

    def bind(self, x: Tensor, w: Tensor, y: Tensor, margin: int, lam: float) -> Bound:
        from quack import linear_cross_entropy as lce

        if any(size % 8 for size in (*x.shape, *w.shape)):
            loss = partial(lce.linear_cross_entropy_func, x, w, None, y)
        else:
            loss = partial(lce.chunked_linear_cross_entropy, x, w, y)
        return Bound(loss, (x, w))
