"""Layers of other L-Softmax implementations, with what they have learned, as layers of this one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import checks
from .modules import LSoftmaxLinear, LSoftmaxLoss, _Annealed
from .schedule import LambdaSchedule

__all__ = ["from_published"]

Layer = TypeVar("Layer", LSoftmaxLinear, LSoftmaxLoss)


class _Source(NamedTuple):
    """What there is to take over."""

    weight: Tensor  # (D, C)
    scale: float  # of the logits
    margin: int | None
    lam: LambdaSchedule | float


def from_published(
    source: nn.Module | Mapping[str, Tensor],
    layer: type[Layer] = LSoftmaxLinear,  # type: ignore[assignment]
    *,
    margin: int | None = None,
    lam: LambdaSchedule | float | None = None,
    prefix: str = "",
    **options: Any,
) -> Layer:
    """A layer that computes what another implementation's did, with its class vectors.

    Knows the published ``LSoftmaxLinear`` layers (``weight`` of shape (D, C), ``margin``,
    ``input_dim``, ``output_dim``; in one of them also ``beta``, which is lam, with ``beta_min`` and
    the ``scale`` that each step multiplies it by) and ``LargeMarginSoftmaxLoss`` of
    pytorch-metric-learning (``W`` of shape (D, C); its ``scale`` goes into the class vectors).
    Class vectors are recognised by where they come from, not by their shape, which at C = D would
    say nothing. (So a state_dict that has nothing but ``weight`` is taken for a published layer's.)

    Args:
        source: such a layer, or its state_dict; of a larger model's, with ``prefix``.
        layer: :class:`LSoftmaxLinear`, or :class:`LSoftmaxLoss`, which is the faster one.
        margin: needed with a state_dict, which does not say it; else only to change it.
        lam: annealing, as in :class:`LSoftmaxLoss`; None: what the source does, which is to go on
            with the curve of its ``beta`` where it has one, and no annealing, 0, where not. A
            state_dict says nothing of it (nor of pytorch-metric-learning's ``scale``): there it is
            0 too.
        prefix: of the keys of a state_dict, such as ``"fc."``.
        options: for ``layer``: ``label_smoothing``, say.

    Returns:
        A new layer with a copy of the weights, transposed, of their type and on their device, and
        in training or evaluation mode as the source is.

    Raises:
        TypeError: ``source`` is of none of these kinds, or has no integer margin.
        ValueError: no margin is known, a state_dict lacks the weight, or its shape is wrong.
    """
    if layer is not LSoftmaxLinear and layer is not LSoftmaxLoss:
        raise TypeError(f"layer: expected LSoftmaxLinear or LSoftmaxLoss, got {layer!r}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a string, got {checks.kind(prefix)}")
    if isinstance(source, nn.Module):
        found = _of_module(source)
    elif not isinstance(source, Mapping):
        raise TypeError(f"source: expected a layer or a state_dict, got {checks.kind(source)}")
    else:
        found = _Source(_of_state_dict(source, prefix), 1.0, None, 0.0)
    if margin is None and found.margin is None:
        raise ValueError(
            "margin: expected an integer >= 1, got None: a state_dict does not say it, pass margin="
        )
    checks.check_dense("weight", found.weight)
    weight = found.weight.detach()
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (D, C), got {tuple(weight.shape)}")
    in_features, classes = weight.shape
    made = layer(
        in_features,
        classes,
        found.margin if margin is None else margin,  # type: ignore[arg-type]
        lam=found.lam if lam is None else lam,
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )
    own = made.linear.weight if isinstance(made, LSoftmaxLoss) else made.weight
    with torch.no_grad():
        own.copy_(weight.t() * found.scale)
    return made.train(source.training if isinstance(source, nn.Module) else True)


def _of_module(source: nn.Module) -> _Source:
    margin: Any = getattr(source, "margin", None)
    names = [kind.__name__ for kind in type(source).__mro__]
    # Of pytorch-metric-learning's losses that have a W, the others compute something else.
    if names[0] == "LargeMarginSoftmaxLoss" and isinstance(getattr(source, "W", None), Tensor):
        ours = isinstance(source, _Annealed)  # the adapter to it
        lam = copy.deepcopy(source.schedule) if ours else 0.0
        return _Source(source.W, float(source.scale), margin, lam)  # type: ignore[arg-type]
    shape = (getattr(source, "input_dim", None), getattr(source, "output_dim", None))
    weight = getattr(source, "weight", None)
    if margin is None or not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
        hint = ""
        if isinstance(source, (nn.Linear, LSoftmaxLoss)):
            hint = "; load_state_dict() loads a (C, D) weight as it is"
        raise TypeError(
            "source: expected a published LSoftmaxLinear (weight, margin, input_dim, output_dim), "
            "pytorch-metric-learning's LargeMarginSoftmaxLoss, or the state_dict of one, got "
            f"{names[0]}{hint}"
        )
    return _Source(weight, 1.0, margin, _lam_of(source))


def _of_state_dict(source: Mapping[str, Tensor], prefix: str) -> Tensor:
    if prefix + "schedule.lam" in source:
        raise ValueError(
            f"source: expected the state_dict of another implementation's layer, got one of this "
            f"package's ({prefix}schedule.lam): load_state_dict() loads it as it is"
        )
    found = [name for name in ("W", "weight") if prefix + name in source]
    if len(found) != 1:
        raise ValueError(
            f"source: expected one of the keys {prefix}weight and {prefix}W, "
            f"got {', '.join(source) or 'no keys'}"
        )
    return source[prefix + found[0]]


_POWER = 1e6  # (1 + g t / power) ** -power is exp(-g t) to 1e-5, where g t is below 4


def _lam_of(source: nn.Module) -> LambdaSchedule | float:
    """Its next step has lam = beta, and each one after it ``scale`` times that."""
    beta = float(getattr(source, "beta", 0.0))
    minimum = float(getattr(source, "beta_min", 0.0))
    factor = float(getattr(source, "scale", 1.0))
    if beta <= minimum or factor >= 1:
        return max(beta, minimum)
    return LambdaSchedule(beta / factor, -math.log(factor) / _POWER, _POWER, minimum)
