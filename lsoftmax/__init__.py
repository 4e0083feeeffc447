"""Large-Margin Softmax (Liu, Wen, Yu, Yang, ICML 2016) for PyTorch, with CUDA kernels."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import _extension, functional, reference
from . import ops as ops
from . import ops_shard as ops_shard
from ._extension import cuda_available
from .diagnostics import MarginStats, collapse_warning, margin_stats
from .modules import LSoftmaxLinear, LSoftmaxLoss
from .published import from_published
from .schedule import LambdaSchedule

__version__ = "0.1.0"
# What they import is large, or not everywhere.
_LATER = ("distributed", "flops", "metric_learning", "plots")
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

if TYPE_CHECKING:
    from . import distributed as distributed
    from . import flops as flops
    from . import metric_learning as metric_learning
    from . import plots as plots
else:

    def __getattr__(name: str) -> ModuleType:
        """The modules that are imported where they are used. (So hasattr() of one imports it.)"""
        if name in _LATER:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# After ops, which registers the ops that the kernels implement.
_extension.load()
