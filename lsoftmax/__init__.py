"""Large-Margin Softmax (Liu, Wen, Yu, Yang, ICML 2016) for PyTorch, with CUDA kernels."""

from . import _extension, functional, reference
from . import ops as ops
from . import ops_shard as ops_shard
from ._extension import cuda_available
from .diagnostics import MarginStats, collapse_warning, margin_stats
from .modules import LSoftmaxLinear, LSoftmaxLoss
from .published import from_published
from .schedule import LambdaSchedule

__version__ = "0.1.0"
__all__ = [
    "LSoftmaxLinear",
    "LSoftmaxLoss",
    "LambdaSchedule",
    "MarginStats",
    "collapse_warning",
    "cuda_available",
    "from_published",
    "functional",
    "margin_stats",
    "reference",
]

# After ops, which registers the ops that the kernels implement.
_extension.load()
