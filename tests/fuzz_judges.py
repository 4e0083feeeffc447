"""What a result of a public entry must be, given its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lsoftmax
from lsoftmax import reference


class WrongError(Exception):
    """What the fuzzer is here to find."""


def require(fact: bool, words: str) -> None:
    if not fact:
        raise WrongError(words)


def modest(*values: Any) -> bool:
    """Whether tensors are finite and of a size that no type overflows from."""
    on_hand = (v for v in values if isinstance(v, Tensor) and not v.is_meta)
    return all(bool((v.double().abs() < 100).all()) for v in on_hand)


def kept_weight(a: dict[str, Any]) -> bool:
    """Whether a mean has anything to divide by."""
    kept = a["target"] != (-100 if a["ignore_index"] is None else a["ignore_index"])
    if a["weight"] is None:
        return bool(kept.any())
    return bool(kept.any()) and bool(a["weight"].double()[a["target"][kept]].sum() > 0)


def judge_loss(a: dict[str, Any], loss: Tensor) -> None:
    wide = a["input"].dtype == torch.float64
    require(loss.dtype == (torch.float64 if wide else torch.float32), f"type {loss.dtype}")
    shape = a["target"].shape if a["reduction"] == "none" else ()
    require(loss.shape == shape, f"shape {loss.shape}")
    sure = modest(a["input"], a["linear_weight"], a["weight"], a["lam"]) and not loss.is_meta
    if sure and float(a["lam"]) >= 0 and (a["reduction"] != "mean" or kept_weight(a)):
        require(bool(loss.isfinite().all()), f"not finite: {loss}")
        options = {key: value for key, value in a.items() if key != "memory_budget"}
        options["input"], options["linear_weight"] = (
            a[key].detach().double() for key in ("input", "linear_weight")
        )
        truth = reference.lsoftmax_loss(**options)
        require(torch.allclose(loss.double(), truth, 1e-4, 1e-4), f"{loss} for {truth}")


def judge_logits(a: dict[str, Any], logits: Tensor) -> None:
    require(logits.dtype == a["input"].dtype, f"type {logits.dtype}")
    shape = (*a["input"].shape[:-1], a["linear_weight"].shape[0])
    require(logits.shape == shape, f"shape {logits.shape}")
    if modest(a["input"], a["linear_weight"], a["lam"]) and not logits.is_meta:
        if float(a["lam"]) < 0:
            return
        wide = (a[key].detach().double() for key in ("input", "linear_weight"))
        truth = reference.lsoftmax_linear(*wide, a["target"], a["margin"], a["lam"])
        bound = 1e-4 if logits.element_size() >= 4 else 2e-2
        scale = 1 + truth.abs().max() if truth.numel() else 1
        close = bool(((logits.double() - truth).abs() <= bound * scale).all())  # no NaN is
        require(close, f"{logits} for {truth}")


def judge_psi(a: dict[str, Any], value: Tensor) -> None:
    c = a["cos_theta"]
    require((value.shape, value.dtype) == (c.shape, c.dtype), "another shape or type")
    if not c.is_meta and c.numel() and bool((c.double().abs() <= 1).all()):
        m = int(a["margin"])
        require(bool((value.double() <= 1.01).all()), f"psi above 1: {value}")
        require(bool((value.double() >= 0.99 - 2 * m).all()), f"psi below 1 - 2m: {value}")


def judge_plan(a: dict[str, Any], plan: Any) -> None:
    require(plan.class_chunk >= 0 and plan.row_chunk >= 0 and plan.bytes >= 0, str(plan))


def judge_schedule(a: dict[str, Any], schedule: Any) -> None:
    require(bool(schedule.lam.isfinite()) and bool(schedule.lam >= 0), f"lam {schedule.lam}")
    schedule.step()
    require(bool(schedule.lam.isfinite()) and bool(schedule.lam >= 0), f"lam {schedule.lam}")
    require(schedule.lam.dtype == torch.float32, "type of lam")


def judge_committed(a: dict[str, Any], schedule: Any) -> None:
    if 0 <= float(a["lam"]) < float("inf"):  # a tensor is not looked at, for that would wait
        require(bool(schedule.lam == torch.tensor(float(a["lam"]))), f"lam {schedule.lam}")
    require(schedule.steps == 1, "steps")


def judge_taken_over(a: dict[str, Any], layer: torch.nn.Module) -> None:
    linear = getattr(layer, "linear", layer)
    require(torch.equal(linear.weight, a["source"]["weight"].t()), "other class vectors")


def judge_layer(a: dict[str, Any], layer: torch.nn.Module) -> None:
    require(layer.lam.is_meta or bool(layer.lam >= 0), f"lam {layer.lam}")
    linear = getattr(layer, "linear", layer)
    require(linear.weight.shape[1] == a["in_features"], "shape")


def judge_stats(a: dict[str, Any], stats: Any) -> None:
    require(stats.buckets.shape == (int(a["margin"]),), f"buckets {stats.buckets.shape}")
    lsoftmax.collapse_warning(stats) if not stats.angle.is_meta else None


def judge_words(a: dict[str, Any], words: Any) -> None:
    require(words is None or isinstance(words, str), f"{words!r}")


def anything(a: dict[str, Any], value: Any) -> None:
    """The reference checks nothing, on purpose: only that the process lives."""
