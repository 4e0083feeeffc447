"""Same or not, from the cosine of two features: accuracy by ten folds, ROC, EER, TAR at FAR."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from extras import needed
from pairs import Pairs

with needed():
    from sklearn.metrics import roc_curve

# False accept rates at which a curve is kept: small in a file, and curves can be averaged.
FAR_GRID = np.logspace(-3, 0, 31)


def cosines(features: Tensor, pairs: Pairs) -> np.ndarray:
    """The score (P,) of each pair, float64; 0 where a feature is zero."""
    features = features.cpu().double()
    return F.cosine_similarity(features[pairs.left], features[pairs.right]).numpy()


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The threshold, of those between two scores, above which "same" is most often right."""
    far, tar, thresholds = roc_curve(same, scores, drop_intermediate=False)
    right = tar * same.sum() + (1 - far) * (~same).sum()
    best = int(right.argmax())
    above = thresholds[best]  # accepted still; the next one no longer
    below = scores[scores < above].max(initial=-np.inf)
    return float(max(-2.0, (min(above, 2.0) + max(below, -2.0)) / 2))


def accuracy(scores: np.ndarray, same: np.ndarray, threshold: float) -> float:
    """Percent of the pairs that the threshold gets right."""
    return 100 * float(((scores > threshold) == same).mean())


def fold_accuracies(scores: np.ndarray, pairs: Pairs) -> list[float]:
    """Of each fold, with the threshold that is best on all other folds: LFW's protocol."""
    same, fold = pairs.same.numpy(), pairs.fold.numpy()
    return [
        accuracy(
            scores[fold == k],
            same[fold == k],
            best_threshold(scores[fold != k], same[fold != k]),
        )
        for k in np.unique(fold)
    ]


def curve(scores: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    """Percent: EER, TAR at FARs of 1% and 0.1%, and the TAR at each of FAR_GRID.

    TAR: share of the same pairs that are accepted; FAR: of the different ones. At a FAR it is the
    TAR of the strictest threshold that accepts no more. EER: where FAR = 1 - TAR, between the two
    thresholds around it.
    """
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    difference = far - (1 - tar)  # from -1 to 1, never falling
    after = int(np.argmax(difference >= 0))
    part = -difference[after - 1] / (difference[after] - difference[after - 1])
    eer = far[after - 1] + part * (far[after] - far[after - 1])

    def tar_at(rate: float) -> float:
        return 100 * float(tar[far <= rate * (1 + 1e-9)].max())

    return {
        "eer": 100 * float(eer),
        "tar_1e-2": tar_at(1e-2),
        "tar_1e-3": tar_at(1e-3),
        "roc": [round(tar_at(rate), 3) for rate in FAR_GRID],
    }
