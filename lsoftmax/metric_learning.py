"""The fused loss as a loss of pytorch-metric-learning: reducers, miners, regularisers, its own W.

One line changes in a training that has ``pytorch_metric_learning.losses.LargeMarginSoftmaxLoss``:

    from lsoftmax.metric_learning import LargeMarginSoftmaxLoss
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from . import checks, functional
from .modules import _Annealed
from .schedule import LambdaSchedule

try:
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.utils import common_functions as common
    from pytorch_metric_learning.utils import loss_and_miner_utils as miners
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "lsoftmax.metric_learning needs pytorch-metric-learning (this is without "
        f"{error.name}): pip install pytorch-metric-learning",
        name=error.name,
    ) from error

__all__ = ["LargeMarginSoftmaxLoss"]


class LargeMarginSoftmaxLoss(losses.LargeMarginSoftmaxLoss, _Annealed):  # type: ignore[misc]
    """``pytorch_metric_learning.losses.LargeMarginSoftmaxLoss``, computed by the fused loss.

    The same constructor, call and ``W`` of shape (D, C), so checkpoints, of optimizers too, go both
    ways; a subclass of it, so what looks for one finds one. And what that lacks: annealing, chunks
    where N x C does not fit, a gradient for an embedding of zeros, and a W that keeps its type.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: integer m >= 1.
        scale: > 0, of the logits; they are not normalised, so 1 unless told.
        lam: annealing, as in :class:`lsoftmax.LSoftmaxLoss`; but 0, no annealing, unless given,
            which is what the library computes. For a training from scratch rather pass
            ``LambdaSchedule.by_angle()`` or ``LambdaSchedule.for_steps(total_steps)``.
        memory_budget: as in :class:`lsoftmax.LSoftmaxLoss`.
        kwargs: the library's: ``reducer``, ``distance`` (a ``CosineSimilarity`` with p = 2 and
            power = 1), ``embedding_regularizer``, ``weight_regularizer``, ``weight_init_func``...

    Shape:
        - embeddings: (N, D); labels: (N,) int64; W: (D, C)
        - output: what the reducer makes of N losses, weighted by how often ``indices_tuple``, a
          miner's, has each.

    Raises:
        ModuleNotFoundError: on import, without pytorch-metric-learning.
        TypeError, ValueError: an argument of the wrong type or value.
    """

    W: nn.Parameter
    scale: float
    distance: Any  # this and the following are the library's, which is not typed
    collect_stats: bool
    get_angles: Callable[[Tensor], Tensor]
    add_weight_regularization_to_loss_dict: Callable[[dict[str, Any], Tensor], None]

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: int = 4,
        scale: float = 1,
        *,
        lam: LambdaSchedule | float | None = 0.0,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        margin = checks.check_margin(margin)
        budget = checks.check_memory_budget(memory_budget)
        if not scale > 0:
            raise ValueError(f"scale: expected > 0, got {scale}")
        super().__init__(num_classes, embedding_size, margin, scale, **kwargs)
        if self.distance.p != 2 or self.distance.power != 1:
            raise ValueError(
                "distance: expected CosineSimilarity with p=2 and power=1, got "
                f"p={self.distance.p}, power={self.distance.power}"
            )
        # A row of memory per class, which is what the loss reads and its gradient is.
        self.W = nn.Parameter(self.W.detach().t().contiguous().t())
        self._init_margin(margin, lam, self.W.device, num_classes)
        self.memory_budget = budget

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:
        """What the reducer is given: a loss for each embedding."""
        common.labels_required(labels)
        common.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        if self.W.device != embeddings.device:  # as the library does
            self.to(embeddings.device)
        class_vectors = self.W.t().to(embeddings.dtype)
        if self.collect_stats:
            self.get_angles(F.cosine_similarity(embeddings, class_vectors[labels]))
        lam, trains = self._begin_forward()
        each, cosine = functional.loss_and_cosine(
            self._scaled(embeddings),
            class_vectors,
            labels,
            self.margin,
            lam,
            reduction="none",
            memory_budget=self.memory_budget,
        )
        if trains:
            self._end_forward(lam, cosine, embeddings, class_vectors, labels)
        result = {
            "loss": {
                "losses": each * miners.convert_to_weights(indices_tuple, labels, each.dtype),
                "indices": common.torch_arange_from_size(embeddings),
                "reduction_type": "element",
            }
        }
        self.add_weight_regularization_to_loss_dict(result, self.W.t())
        return result

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, C) plain logits, for inference."""
        return F.linear(self._scaled(embeddings), self.W.t().to(embeddings.dtype))

    def _scaled(self, embeddings: Tensor) -> Tensor:
        return embeddings if self.scale == 1 else embeddings * self.scale
