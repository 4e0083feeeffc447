"""Faults of the loss and the logits in plain torch."""

from __future__ import annotations

from . import Fault
from .kernels import CERTAIN_64, CHUNKS, EDGES, LINEAR, MARGINS, OPTIONS, PEAKS, SIZES

PANELS = "test_panels.py::test_logits_that_rise_from_panel_to_panel"
ON_CLASS = "test_edges.py::test_features_on_their_class_vectors"


def portable(name: str, file: str, text: str, instead: str, *tests: str) -> Fault:
    return Fault(name, f"lsoftmax/{file}", text, instead, " ".join(tests))


FAULTS = [
    portable(
        "torch psi: the parity of the bucket is dropped",
        "margin.py",
        "parity = 1.0 - 2.0 * (k % 2)",
        "parity = 1.0",
        MARGINS,
    ),
    portable(
        "torch psi: one bucket too few",
        "margin.py",
        "for j in range(1, margin))",
        "for j in range(1, margin - 1))",
        MARGINS,
        EDGES,
    ),
    portable(
        "torch: the cosine near 1 from the dot product",
        "margin.py",
        "_NEAR = 0.9",
        "_NEAR = 2.0",
        ON_CLASS,
    ),
    portable(
        "torch: norms squared in float32 whatever their size",
        "margin.py",
        "_SAFE_NORMS = (1e-15, 1e15)",
        "_SAFE_NORMS = (0.0, 1e300)",
        EDGES,
    ),
    portable(
        "torch: a zero row has no gradient",
        "margin.py",
        "alpha = xp.where(undefined, 1.0, alpha)",
        "alpha = xp.where(undefined, 0.0, alpha)",
        "test_edges.py::test_zero_row_leaves_zero",
    ),
    portable(
        "torch: beta and gamma swapped",
        "margin.py",
        "beta, gamma = q * ratio, q / ratio",
        "beta, gamma = q / ratio, q * ratio",
        MARGINS,
    ),
    portable(
        "torch loss: log(1 + e) for softplus",
        "rows.py",
        "xp.where(gap < 0, 0.0, -gap) - xp.log1p(xp.exp(-abs(gap)))",
        "-xp.log(1 + xp.exp(gap))",
        CERTAIN_64,
    ),
    portable(
        "torch: p - 1 by subtraction",
        "rows.py",
        "t = xp.expm1(log_p)",
        "t = xp.exp(log_p) - 1",
        CERTAIN_64,
    ),
    portable(
        "torch: an ignore_index that is a class is taken for one",
        "rows.py",
        "and high < num_classes and not low <= ignore_index <= high:",
        "and high < num_classes:",
        "test_loss.py::test_ignored_rows_may_hold_anything",
    ),
    portable(
        "torch mean: divided by all rows",
        "rows.py",
        "return kept.sum().to(dtype)",
        "return torch.full((), index.shape[0], dtype=dtype, device=index.device)",
        OPTIONS,
    ),
    portable(
        "torch: ignored rows keep their backward numbers",
        "rows.py",
        "return rows if kept is None else rows.masked_fill_(~kept, 0.0)",
        "return rows",
        "test_digits.py::test_ignored_rows_may_hold_anything",
    ),
    portable(
        "torch panels: a high logit does not raise the reference",
        "panels.py",
        "_HEADROOM = 40.0",
        "_HEADROOM = 4000.0",
        PEAKS,
        PANELS,
    ),
    portable(
        "torch panels: a raised reference leaves the sum as it was",
        "panels.py",
        "        self.others = self.others * factor\n",
        "",
        PEAKS,
        PANELS,
    ),
    portable(
        "torch panels: a raised reference leaves E as it was",
        "panels.py",
        "        if written is not None:\n"
        "            written.mul_(column_of(factor, written.dtype))\n",
        "",
        PEAKS,
        PANELS,
    ),
    portable(
        "torch panels: a last panel of one class is lost",
        "panels.py",
        "for start in range(0, num_classes, width):",
        "for start in range(0, max(1, num_classes - 1), width):",
        CHUNKS,
    ),
    portable(
        "torch backward: smoothing's constant part of dW is lost",
        "products.py",
        "            dw.addr_(weight, torch.mv(x.t(), constant))\n",
        "            pass\n",
        OPTIONS,
    ),
    portable(
        "torch backward: E is scaled in place",
        "products.py",
        "        e = e * back.scale\n",
        "        e = e.mul_(back.scale)\n",
        "test_loss.py::test_second_backward_and_saved_tensors",
    ),
    portable(
        "torch row chunks: dW of the last chunk alone",
        "products.py",
        "torch.mm(a, b) if total is None else total.addmm_(a, b)",
        "torch.mm(a, b)",
        CHUNKS,
    ),
    portable(
        "torch class chunks: the target's exponential is among the others'",
        "products.py",
        "target.fill(-math.inf)  # its exponential may be out of range",
        "pass",
        CHUNKS,
    ),
    portable(
        "torch: a class has the share of its last row alone",
        "shares.py",
        "h = own.new_zeros(w.shape[0]).index_add_(0, target, own)",
        "h = own.new_zeros(w.shape[0]).index_copy_(0, target, own)",
        SIZES,
    ),
    portable(
        "torch logits: the product's slope of 1 is counted twice",
        "portable_linear.py",
        "rest = g_y * (alpha - 1)",
        "rest = g_y * alpha",
        LINEAR,
    ),
    portable(
        "torch logits: the cosine from a logit rounded to 16 bits",
        "portable_linear.py",
        "if logits.dtype == accumulate_type(input.dtype):",
        "if logits.dtype.is_floating_point:",
        "test_digits.py::test_margin_logits_of_16_bits_are_rounded_once",
    ),
    portable(
        "plan: what just fits is computed in chunks",
        "plan.py",
        "if n * row_bytes <= memory_budget:",
        "if n * row_bytes < memory_budget:",
        "test_plan.py::test_what_fits_is_kept",
    ),
    portable(
        "plan: chunks of classes are rounded down to whole packs",
        "plan.py",
        "return -(-size // multiple) * multiple",
        "return size // multiple * multiple",
        "test_plan.py",
    ),
]
