"""Faults of annealing that counts every class alike."""

from __future__ import annotations

from .kernels import kernel
from .portable import portable

MEANS = "test_class_cosines.py::test_running_means"

FAULTS = [
    portable(
        "annealing by class: a class that has not come counts",
        "portable_classes.py",
        "known = (classes[1] >= 0).sum()",
        "known = classes.shape[1]",
        MEANS,
    ),
    portable(
        "annealing by class: the first batch is taken in like any other",
        "portable_classes.py",
        "rate = 1 - memory * begun",
        "rate = 1 - memory + 0 * begun",
        MEANS,
    ),
    portable(
        "annealing by class: a class without rows in a batch is NaN",
        "portable_classes.py",
        "torch.where(count > 0, old + rate * (means - old), old)",
        "old + rate * (means - old)",
        MEANS,
        "test_class_cosines.py::test_ignored_rows",
    ),
    portable(
        "annealing by class: ignored rows are of class 0",
        "portable_classes.py",
        "torch.cat([kept.long().unsqueeze(0), exact])",
        "torch.cat([torch.ones_like(exact[:1]), exact])",
        MEANS,
    ),
    portable(
        "annealing by class: sums in float32, in the order of the rows",
        "portable_classes.py",
        "exact = (moments.double() * _ONE).round().long()\n"
        "    sums = label.new_zeros(3, classes.shape[1])\n"
        "    sums.index_add_(1, label, torch.cat([kept.long().unsqueeze(0), exact]))",
        "exact = moments * _ONE\n"
        "    sums = exact.new_zeros(3, classes.shape[1])\n"
        "    sums.index_add_(1, label, torch.cat([kept.float().unsqueeze(0), exact]))",
        "test_class_cosines.py::test_order_of_the_rows",
    ),
    portable(
        "annealing by class: by the mean, as if no class were harder",
        "portable_classes.py",
        "low = mean - (square - mean * mean).abs().sqrt()",
        "low = mean",
        MEANS,
    ),
    portable(
        "annealing by class: the layer goes by its rows",
        "modules.py",
        "            cosine = self.schedule.count_classes(",
        "            self.schedule.count_classes(",
        "test_class_cosines.py::test_layers_go_by_it",
    ),
    kernel(
        "annealing by class: the kernel's first batch is taken in like any other",
        "class_cosines.cu",
        "square < 0 ? 1 : static_cast<float>(1 - p.memory)",
        "static_cast<float>(1 - p.memory)",
        MEANS,
    ),
    kernel(
        "annealing by class: the kernel counts ignored rows",
        "class_cosines.cu",
        "  if (given == INFINITY) return;\n",
        "",
        MEANS,
    ),
    kernel(
        "annealing by class: the kernel's classes of a second block are those of the first",
        "class_cosines.cu",
        "  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;\n"
        "  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;",
        "  const int64_t stride = blockDim.x;\n  for (int64_t k = threadIdx.x;",
        "test_class_cosines.py::test_many_classes",
    ),
    kernel(
        "annealing by class: of the kernel's blocks only the first is added up",
        "class_cosines.cu",
        "k < p.partials; k += blockDim.x",
        "k < 1; k += blockDim.x",
        "test_class_cosines.py::test_many_classes",
    ),
    kernel(
        "annealing by class: the kernel lets NaN in",
        "class_cosines.cu",
        "isnan(given) ? 0 : given",
        "given",
        MEANS,
    ),
]
