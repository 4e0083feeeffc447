"""Faults of the CUDA kernels, seen by their emulation."""

from __future__ import annotations

from . import Fault

SIZES = "test_loss.py::test_every_size_and_type"
MARGINS = "test_loss.py::test_every_margin"
OPTIONS = "test_loss.py::test_every_option"
SMOKE = "test_loss.py::test_sanitizer_smoke"
EDGES = "test_edges.py::test_any_angle_and_norm_is_finite_and_right"
PEAKS = "test_edges.py::test_peaks_anywhere_in_a_long_row"
ALIKE = "test_edges.py::test_classes_alike_beyond_what_a_float_counts"
CERTAIN_64 = "test_digits.py::test_certain_rows_in_float64"
CHUNKS = "test_chunks.py::test_every_size_of_chunk"
LINEAR = "test_linear.py::test_every_size_and_type"
HOPPER = "test_hopper.py::test_exponentials"
FAR_ROWS = "test_emulation_engine.py::test_rows_of_logits_far_apart"


def kernel(name: str, file: str, text: str, instead: str, *tests: str) -> Fault:
    return Fault(name, f"csrc/{file}", text, instead, " ".join(tests), "emulation")


def hopper(name: str, file: str, text: str, instead: str, *tests: str) -> Fault:
    """Of a launch that its tests make by themselves: they load the emulation they need."""
    return Fault(f"Hopper: {name}", f"csrc/{file}", text, instead, " ".join(tests))


FAULTS = [
    kernel(
        "psi: sign of the buckets swapped",
        "margin.cuh",
        "k % 2 == 0 ? 1 : -1",
        "k % 2 == 0 ? -1 : 1",
        MARGINS,
    ),
    kernel(
        "psi: the last bucket is lost",
        "margin.cuh",
        "k += (next < 0)",
        "k += n + 1 < margin && (next < 0)",
        MARGINS,
        EDGES,
    ),
    kernel(
        "gamma: |w| / |x| for |x| / |w|",
        "margin.cuh",
        "q * a / b};",
        "q * b / a};",
        MARGINS,
    ),
    kernel(
        "a zero row has no gradient",
        "margin.cuh",
        "return {0, 1, 0, 0};",
        "return {0, 0, 0, 0};",
        "test_edges.py::test_zero_row_leaves_zero",
    ),
    kernel(
        "products: the ragged tail is lost",
        "margin.cuh",
        "j < d; j += blockDim.x) add(x[j], w[j]);",
        "j < 0; j += blockDim.x) add(x[j], w[j]);",
        SIZES,
    ),
    kernel(
        "reduction: no barrier before the partial sums are read",
        "block.cuh",
        "partial[threadIdx.x / kWarp] = value;\n  __syncthreads();",
        "partial[threadIdx.x / kWarp] = value;",
        SMOKE,
    ),
    kernel(
        "loss: log(1 + e) for softplus",
        "row_terms.cuh",
        "gap > 0 ? gap + log1p(exp(-gap)) : log1p(exp(gap));",
        "log(1 + exp(gap));",
        CERTAIN_64,
    ),
    kernel(
        "p - 1: by subtraction",
        "row_terms.cuh",
        "gap > 0 ? -1 / (1 + exp(-gap)) : -exp(gap) / (1 + exp(gap));",
        "exp(m.f - r) / s - 1;",
        CERTAIN_64,
    ),
    kernel(
        "the unit of E: f may be hundreds above the reference that rounded it",
        "row_terms.cuh",
        "m.f > r + kSlack ? r + kSlack : m.f;",
        "m.f;",
        ALIKE,
    ),
    kernel(
        "sums are merged without rescaling",
        "row_terms.cuh",
        "p.e_sum * exponential(p.reference - r)",
        "p.e_sum",
        PEAKS,
        CHUNKS,
    ),
    kernel(
        "smoothing: the constant part of column y is not taken back",
        "row_terms.cuh",
        "g * m.alpha + share * q.w_y;",
        "g * m.alpha;",
        OPTIONS,
    ),
    kernel(
        "row pass: the ragged tail is lost",
        "loss_rows.cu",
        "j < p.width; j += blockDim.x) take(load<1>(j), j);",
        "j < tail(); j += blockDim.x) take(load<1>(j), j);",
        SIZES,
    ),
    kernel(
        "row pass: the target counts among the others",
        "loss_rows.cu",
        "if (v == place) logits.values[v] = -INFINITY;",
        "if (v == place) logits.values[v] += A(0);",
        SIZES,
    ),
    kernel(
        "row pass: a high logit does not raise the reference",
        "loss_rows.cu",
        "if (peak > sums.reference + kSlack) raise(peak, j);",
        "if (peak > sums.reference + 1000) raise(peak, j);",
        PEAKS,
    ),
    kernel(
        "row pass: a raised reference leaves the sum as it was",
        "loss_rows.cu",
        "    sums.e_sum *= factor;\n",
        "",
        PEAKS,
    ),
    kernel(
        "row pass: a raised reference leaves the tail of E as it was",
        "loss_rows.cu",
        "j < end; j += blockDim.x) rescale<1>(factor, j);\n  }",
        "j < head; j += blockDim.x) rescale<1>(factor, j);\n  }",
        PEAKS,
    ),
    kernel(
        "row pass: ignored rows keep what is in E",
        "loss_rows.cu",
        "(ignored ? 0 : p.width) + threadIdx.x",
        "p.width + threadIdx.x",
        "test_loss.py::test_ignored_rows_may_hold_anything",
        OPTIONS,
    ),
    kernel(
        "row pass: offsets of 32 bits",
        "loss_rows.cu",
        "z(params.z + i * params.z_stride)",
        "z(params.z + static_cast<int>(i * params.z_stride))",
        FAR_ROWS,
    ),
    kernel(
        "mean: divided by the rows, not by their weights",
        "loss_sum.cu",
        "p.mean ? sum.weight : 1",
        "p.mean ? static_cast<double>(p.n) : 1",
        OPTIONS,
    ),
    kernel(
        "backward: the infinite gradient of a mean of nothing gets through",
        "gradients.cu",
        "if (p.target[i] == p.ignore_index) return A(0);",
        "",
        "test_loss.py::test_all_rows_ignored",
    ),
    kernel(
        "backward: the upstream gradient is not divided",
        "gradients.cu",
        "p.grad[i]) / *p.divisor;",
        "p.grad[i]);",
        SIZES,
    ),
    kernel(
        "backward: the input's share with the wrong sign",
        "gradients.cu",
        "if (share != 0) value += share",
        "if (share != 0) value -= share",
        MARGINS,
    ),
    kernel(
        "backward: every row of a class adds the class's share",
        "gradients.cu",
        "place > 0 && y_before == y",
        "place < 0 && y_before == y",
        SIZES,
    ),
    kernel(
        "backward: NaN of an ignored row reaches its class",
        "gradients.cu",
        "if (share != 0) sum.values[v] +=",
        "sum.values[v] +=",
        "test_digits.py::test_ignored_rows_may_hold_anything",
    ),
    kernel(
        "backward: rows of a class are fetched over those still being read",
        "gradients.cu",
        "    __syncthreads();  // those before have been read\n",
        "",
        "test_loss.py::test_a_class_of_many_rows",
    ),
    kernel(
        "backward: of a class's rows the first are fetched again and again",
        "gradients.cu",
        "order[k < count ? first + k : first];",
        "order[k < count ? k : first];",
        "test_loss.py::test_a_class_of_many_rows",
    ),
    kernel(
        "backward: no barrier before the columns' sums are read",
        "gradients.cu",
        "partial[static_cast<int>(threadIdx.x)] = sum;\n  __syncthreads();",
        "partial[static_cast<int>(threadIdx.x)] = sum;",
        "test_digits.py::test_smoothing_of_long_features",
    ),
    kernel(
        "order: rows of one class share a place",
        "order.cuh",
        "others[m] < y || (others[m] == y && k < i) ? 1 : 0",
        "others[m] < y ? 1 : 0",
        SIZES,
    ),
    kernel(
        "chunks: the target is looked for among all classes",
        "exponentials.cu",
        "target(p.target[i] - p.first_class)",
        "target(p.target[i])",
        CHUNKS,
    ),
    kernel(
        "chunks: a ragged last pack keeps its logits",
        "exponentials.cu",
        "j = packs * kVector + threadIdx.x; j < p.width;",
        "j = p.width; j < p.width;",
        CHUNKS,
    ),
    kernel(
        "chunks: exponentials cut off at the row pass' slack, where Hopper's forward allows more",
        "exponentials.cu",
        "if (above > kFarthest) above = kFarthest;",
        "if (above > kSlack) above = kSlack;",
        "test_fused_forward.py::test_backward_apart_from_a_fused_forward",
    ),
    kernel(
        "chunks: offsets of 32 bits",
        "exponentials.cu",
        "z(p.z + i * p.stride)",
        "z(p.z + static_cast<int>(i * p.stride))",
        FAR_ROWS,
    ),
    kernel(
        "backward: offsets of 32 bits",
        "gradients.cu",
        "(p.dw + line * p.d + j);",
        "(p.dw + static_cast<int>(line * p.d + j));",
        "test_emulation_engine.py::test_classes_beyond_32_bits",
    ),
    kernel(
        "margin logits: the product's slope of 1 is counted twice",
        "margin_logits.cu",
        "g * (p.coefficients[i] - 1)",
        "g * p.coefficients[i]",
        LINEAR,
    ),
    hopper(
        "the target's exponential is among the others'",
        "epilogue.cuh",
        "(column < end && column != target)",
        "column < end",
        HOPPER,
    ),
    hopper(
        "ignored rows have exponentials",
        "epilogue.cuh",
        "    if (row.y == p.ignore_index) end = 0;\n",
        "",
        HOPPER,
    ),
    hopper(
        "no barrier before a warp's chunk is stored",
        "epilogue.cuh",
        "    __syncwarp();\n#pragma unroll\n    for (int k = 0; k < kTimes; ++k) values",
        "#pragma unroll\n    for (int k = 0; k < kTimes; ++k) values",
        HOPPER,
    ),
    hopper(
        "E's offsets of 32 bits",
        "epilogue.cuh",
        "p.e + (i + k * kRows) * p.e_stride + j)",
        "p.e + static_cast<int>((i + k * kRows) * p.e_stride + j))",
        "test_hopper.py::test_rows_of_e_beyond_32_bits",
    ),
    hopper(
        "rows beyond the last are read",
        "epilogue.cuh",
        "row < p.n ? row : p.n - 1",
        "row",
        "test_sanitized.py::test_kernels_under_sanitizers[smoke]",
    ),
    hopper(
        "the producer fills stages that are being read",
        "gemm_exponentials.cu",
        "wait(ring.empty[at.slot], at.parity ^ 1);",
        "wait(ring.empty[at.slot], 1);",
        HOPPER,
    ),
    hopper(
        "both warpgroups multiply the upper rows",
        "gemm_exponentials.cu",
        "follows ? kProductRows : 0;",
        "follows ? 0 : 0;",
        HOPPER,
    ),
    hopper(
        "sums that overflowed are taken as they are",
        "exponential_rows.cu",
        "s > ldexp(1.0, kSafe)",
        "s < 0",
        "test_hopper.py::test_rows_far_from_their_reference_are_done_anew",
    ),
]
