"""Faults of the kernels' host code, seen by their emulation."""

from __future__ import annotations

from . import Fault
from .kernels import CHUNKS, OPTIONS, SIZES, kernel

CHUNK_OPTIONS = "test_chunks.py::test_every_option"


def plan(name: str, text: str, instead: str) -> Fault:
    """Of what the plan thinks that the engine does."""
    tests = "test_engine_memory.py::test_the_plan_counts_what_is_held"
    return Fault(f"plan: {name}", "lsoftmax/plan.py", text, instead, tests, "emulation")


FAULTS = [
    kernel(
        "products of 16-bit factors are rounded to 16 bits",
        "host.h",
        "matmul(std::move(out), a.to(type), b.to(type), add);",
        "const Tensor narrow = at::mm(a, b); add ? out.add_(narrow) : out.copy_(narrow);",
        SIZES,
    ),
    kernel(
        "the target's part goes into a bfloat16 E",
        "loss.h",
        "!shard && e_is_wide() && x",
        "!shard && x",
        "test_edges.py::test_features_on_their_class_vectors",
        "test_edges.py::test_nearly_certain_rows_keep_their_digits",
        SIZES,
        OPTIONS,
    ),
    kernel(
        "the target's part goes into a float16 E, which has 11 digits",
        "loss.h",
        " && x.scalar_type() != at::kHalf",
        "",
        "test_edges.py::test_float16_features_on_their_class_vectors",
    ),
    kernel(
        "Hopper: a row is done again in units of log 2, of which a huge logit knows no single ones",
        "exponential_rows.cu",
        "exponential(z - reference)",
        "exp2f(fmaf(z, kLog2E, -reference * kLog2E))",
        "test_fused_forward.py::test_logits_of_any_size",
    ),
    kernel(
        "a gradient a row is read as one",
        "loss_steps.cpp",
        "params.grad_per_row = grad.defined() && grad.dim() == 1;",
        "params.grad_per_row = false;",
        OPTIONS,
    ),
    kernel(
        "smoothing: divided by the rows for the classes",
        "loss_steps.cpp",
        "static_cast<double>(loss.c());\n    C10_CUDA_CHECK(launch_backward_rows",
        "static_cast<double>(loss.n());\n    C10_CUDA_CHECK(launch_backward_rows",
        OPTIONS,
    ),
    kernel(
        "class chunks: a last chunk of one class is lost",
        "class_chunks.cpp",
        "for (int64_t first = 0; first < c; first += chunk) {\n"
        "    const int64_t width = std::min(chunk, c - first);\n"
        "    make_logits(loss, panel, first, width);\n    loss_rows",
        "for (int64_t first = 0; first < c - 1; first += chunk) {\n"
        "    const int64_t width = std::min(chunk, c - first);\n"
        "    make_logits(loss, panel, first, width);\n    loss_rows",
        CHUNKS,
    ),
    kernel(
        "class chunks: dX of the last chunk alone",
        "class_chunks.cpp",
        "w.narrow(0, first, width).to(e_type), /*add=*/first > 0);",
        "w.narrow(0, first, width).to(e_type), /*add=*/false);",
        CHUNKS,
    ),
    kernel(
        "class chunks: dX summed in 16 bits",
        "class_chunks.cpp",
        "matmul_e(loss, product, e, w.narrow(0, first, width).to(e_type), /*add=*/first > 0);",
        "matmul_e(loss, product, e, w.narrow(0, first, width).to(e_type), /*add=*/first > 0);"
        " product.copy_(product.to(x.scalar_type()));",
        "test_chunks.py::test_sums_over_chunks_are_wide",
    ),
    kernel(
        "row chunks: dW of the last chunk alone",
        "row_chunks.cpp",
        "upstream.scaled_x, /*add=*/first > 0);",
        "upstream.scaled_x, /*add=*/false);",
        CHUNKS,
    ),
    kernel(
        "row chunks: every chunk's losses in the place of the first's",
        "row_chunks.cpp",
        "rows.part(first, count, saved)",
        "rows.part(0, count, saved)",
        CHUNKS,
    ),
    kernel(
        "row chunks: the divisor is each chunk's own",
        "row_chunks.cpp",
        "    const Upstream upstream =\n",
        "    loss_sum(part, mean, Rows(), {Tensor(), divisor, Tensor()}, scope.stream);\n"
        "    const Upstream upstream =\n",
        CHUNKS,
        CHUNK_OPTIONS,
    ),
    kernel(
        "Hopper: taken with label smoothing too",
        "fused_forward.cpp",
        "!loss.smooth() && ",
        "",
        "test_digits.py::test_smoothing_with_the_fused_forward_switched_on",
    ),
    kernel(
        "Hopper: not taken by as many tiles as keep a device busy",
        "fused_forward.cpp",
        "tiles(loss.n(), loss.c()) >= kLeastTiles",
        "tiles(loss.n(), loss.c()) > kLeastTiles",
        "test_fused_forward.py::test_taken_by_size",
    ),
    kernel(
        "Hopper: not taken where a matrix begins within a pack",
        "loss_steps.cpp",
        "return begins_a_pack || rows.scalar_type() != at::kBFloat16 ? rows : rows.clone();",
        "return begins_a_pack ? rows : rows;",
        "test_fused_forward.py::test_taken_wherever_the_matrices_lie",
    ),
    kernel(
        "Hopper: a chunk's exponentials are of the first classes",
        "fused_forward.cpp",
        "  product.w += first_class * loss.d();\n",
        "",
        "test_fused_forward.py::test_chunks_take_it",
    ),
    kernel(
        "Hopper: a chunk looks for targets among the first classes",
        "fused_forward.cpp",
        "  product.first_class = first_class;\n",
        "",
        "test_fused_forward.py::test_chunks_take_it",
    ),
    kernel(
        "float16: exponentials keep a digit more than the tensor cores read",
        "block.cuh",
        "(bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu",
        "(bits + 0x7ffu + (bits >> 12 & 1)) & ~0xfffu",
        "test_loss.py::test_float16_keeps_no_more_digits_than_tensor_cores_read",
    ),
    plan("an exponential of the one kernel's takes a byte", "_FUSED_BYTES = 2", "_FUSED_BYTES = 1"),
    plan(
        "one kernel makes the exponentials of chunks however small",
        "if tiles >= _LEAST_TILES and",
        "if",
    ),
    plan(
        "the one kernel needs nothing beside the exponentials",
        "classes * _FUSED_BYTES + beside if",
        "classes * _FUSED_BYTES if",
    ),
    plan(
        "the one kernel takes all classes in chunks of memory however small",
        " and enough:",
        ":",
    ),
    plan(
        "the one kernel is taken for chunks of rows by the size of the batch",
        "rows, classes = plan.row_chunk or n,",
        "rows, classes = n,",
    ),
    plan("a row's own numbers take nothing", "_ROW_BYTES = 56 + 28", "_ROW_BYTES = 0"),
]
