"""What every public entry checks of its arguments, each error saying what was expected and came."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import Tensor

from .rows import MEAN, NONE, SUM

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}

# psi takes as many steps, each of which adds a rounding: far above any use, and no endless loop.
_LARGEST_MARGIN = 1000

# torch's own, where none is given.
_IGNORED = -100


def check_margin(margin: int) -> int:
    """The margin as an int; TypeError or ValueError where it is none or outside [1, 1000]."""
    number = positive("margin", margin)
    if number > _LARGEST_MARGIN:
        raise ValueError(f"margin: expected an integer <= {_LARGEST_MARGIN}, got {number}")
    return number


def positive(name: str, value: int) -> int:
    """The value as an int; TypeError or ValueError where it is none, < 1 or not of 64 bits."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer >= 1, got {kind(value)} ({value!r})")
    if number < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {number}")
    if number >= 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {number}")
    return number


def check_dtype(dtype: torch.dtype | None) -> None:
    """TypeError unless a layer may have it."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        raise TypeError(f"dtype: expected float32, float64, float16 or bfloat16, got {dtype!r}")


def check_number(name: str, value: float) -> float:
    """The value as a float; TypeError or ValueError unless it is >= 0 and finite in float32."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number >= 0, got {kind(value)}")
    number = value.item() if isinstance(value, np.generic) else value  # float16 may not be compared
    if not 0 <= number <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name}: expected a number >= 0, finite in float32, got {value}")
    return float(number)


def is_integer(value: object) -> bool:
    """Whether it is an integer, Python's or numpy's; True is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is an integer or a floating-point number, Python's or numpy's."""
    return isinstance(value, (float, np.floating)) or is_integer(value)


def check_ignore_index(ignore_index: int | None) -> int:
    """The index as an int, -100 for None; TypeError or ValueError where it is none."""
    if ignore_index is None:
        return _IGNORED
    if not is_integer(ignore_index):
        raise TypeError(f"ignore_index: expected an integer, got {kind(ignore_index)}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {ignore_index}")
    return int(ignore_index)


def check_no_bias(bias: bool) -> None:
    """ValueError unless it is False, which torch's layers may be told."""
    if bias:
        raise ValueError(f"bias: expected False, got {bias!r}: the margin is of angles alone")


def check_loss_options(reduction: str, label_smoothing: float = 0.0) -> None:
    """TypeError or ValueError unless these are what F.cross_entropy takes."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {list(REDUCTIONS)}, got {reduction!r}")
    if not is_number(label_smoothing):
        raise TypeError(
            f"label_smoothing: expected a number in [0, 1], got {kind(label_smoothing)}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")


def check_memory_budget(memory_budget: int | None) -> int | None:
    """None or a number of bytes; TypeError or ValueError where it is neither."""
    if memory_budget is None:
        return None
    if not is_integer(memory_budget):
        raise TypeError(f"memory_budget: expected bytes or None, got {kind(memory_budget)}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget: expected a positive number of bytes, got {memory_budget}")
    return int(memory_budget)


def check_class_weight(weight: Tensor, num_classes: int) -> None:
    """TypeError or ValueError unless ``weight`` is a (C,) floating-point tensor."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor or None, got {kind(weight)}")
    check_dense("weight", weight)
    if weight.shape != (num_classes,):
        raise ValueError(
            f"weight: expected one per class, shape ({num_classes},), got {tuple(weight.shape)}"
        )


def check_matrices(input: Tensor, linear_weight: Tensor, target: Tensor) -> None:
    """TypeError or ValueError unless these are features, class vectors and targets that fit."""
    check_features(input, linear_weight)
    check_dense("target", target)
    if target.dtype != torch.int64:
        floating = target.is_floating_point()
        hint = " (soft labels: docs/faq.md)" if floating else ": pass target.long()"
        raise TypeError(f"target: expected int64 class indices, got {kind(target)}{hint}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target: expected shape {tuple(input.shape[:-1])} for input {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
    check_device("target", target, input)


def check_features(input: Tensor, linear_weight: Tensor) -> None:
    """TypeError or ValueError unless these are features and class vectors that fit."""
    check_dense("input", input)
    check_dense("linear_weight", linear_weight)
    if input.dtype not in FLOATS:
        raise TypeError(f"input: expected float32, float64, float16 or bfloat16, got {kind(input)}")
    if linear_weight.dtype != input.dtype:
        raise TypeError(
            f"linear_weight: expected the type of input ({input.dtype}), got {linear_weight.dtype}"
        )
    if input.dim() not in (1, 2):
        raise ValueError(f"input: expected shape (N, D) or (D,), got {tuple(input.shape)}")
    if linear_weight.dim() != 2 or linear_weight.shape[0] == 0:
        raise ValueError(
            f"linear_weight: expected shape (C, D) with C >= 1, got {tuple(linear_weight.shape)}"
        )
    if linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"input: expected D = {linear_weight.shape[1]} for linear_weight "
            f"{tuple(linear_weight.shape)}, got {tuple(input.shape)}"
        )
    check_device("linear_weight", linear_weight, input)
    if input.device.type == "mps":
        raise ValueError(
            f"input: expected on a CPU or a CUDA device, got {input.device}, which has no float64: "
            "keep the head, and what goes into it, on the CPU"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    """TypeError unless it is a tensor whose elements lie in memory by strides."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind(tensor)}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor: fully_shard a module whose forward "
            "calls the head, not the head or its linear; sharded classes have a loss and "
            "margin_stats(input, target) of their own in lsoftmax.distributed"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")


def lam_tensor(lam: float | Tensor, input: Tensor) -> Tensor:
    """lam as the 0-dim float32 tensor that the kernels read on the device."""
    if not isinstance(lam, Tensor):
        return torch.full((), check_number("lam", lam), dtype=torch.float32, device=input.device)
    if lam.dim() != 0 or not lam.is_floating_point():
        raise TypeError(f"lam: expected a number or a 0-dim float tensor, got {kind(lam)}")
    check_dense("lam", lam)
    check_device("lam", lam, input)
    if is_transformed():
        return lam.to(torch.float32)
    if lam.requires_grad or lam.dtype != torch.float32:
        return lam.detach().to(torch.float32)
    return lam


def check_constant(name: str, value: float | Tensor | None) -> None:
    """RuntimeError where a gradient is wanted of what has none, and None would come back. (The
    reference, which runs under a transform, has one of lam.)
    """
    wanted = isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()
    if wanted and not is_transformed():
        hint = " (lsoftmax.reference has one of lam)" if name == "lam" else ""
        raise RuntimeError(
            f"{name}: expected a tensor that requires no gradient, which there is none of, got one "
            f"that does: pass {name}.detach(){hint}"
        )


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    """ValueError unless the tensor is where the input is."""
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected on {input.device} like input, got {tensor.device}")


def is_recomputed() -> bool:
    """Whether this forward is run again in backward, by ``torch.utils.checkpoint``. With
    ``use_reentrant=True`` that can't be told, nor need it be: there the first run has gradients
    disabled. Only the other kind recomputes under hooks for saved tensors.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is under way: the ops have first derivatives in reverse
    mode only, plain torch has all that there are.
    """
    return torch._C._are_functorch_transforms_active()


def kind(value: object) -> str:
    """What came, for an error."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__
