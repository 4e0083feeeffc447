"""The classes of a negative sample."""

from __future__ import annotations

import torch

from lsoftmax.sampling import ClassSampling


def test_samples_are_fair() -> None:
    """Targets always; every other class as often as the next, and not the same ones on two ranks.

    Each of 37 classes has 7 of 37 chances in 400 draws: 76 times, with a deviation of 8.
    """
    sampling = ClassSampling(0.25, 0, torch.device("cpu"))
    counts, alike = torch.zeros(40), 0
    target = torch.tensor([3, -1, 3, 31, 17])
    for _ in range(400):
        chosen, other = (sampling(target, 40, rank) for rank in (0, 1))
        assert torch.equal(chosen, sampling(target, 40, 0))
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == 10
        counts[chosen] += 1
        alike += torch.equal(chosen, other)
        sampling.advance()
    positives = torch.tensor([3, 17, 31])
    assert (counts[positives] == 400).all()
    counts[positives] = 76
    assert counts.min() > 76 - 6 * 8
    assert counts.max() < 76 + 6 * 8
    assert alike == 0
    assert sampling.draws == 400
