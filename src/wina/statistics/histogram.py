"""Log-spaced histograms of non-negative scores.

The bit pattern of a positive float32 grows with its value, so a bin index is a shift and a
subtraction: sixteen bins an octave, linear within an octave, from 2**-40 to 2**24. Values below
or above fall into the first or last bin. Histograms of the same scores add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 19  # of float32's 23 mantissa bits, the upper 4 stay
FIRST = (127 - 40) << (23 - SHIFT)
BINS = 64 << (23 - SHIFT)


def bin_of(scores: Tensor) -> Tensor:
    """Return the bin of each score, int32 in [0, BINS); scores are float32 and not negative."""
    bins: Tensor = (scores.view(torch.int32) >> SHIFT) - FIRST
    return bins.clamp_(0, BINS - 1)


def bin_edges() -> Tensor:
    """Return the values between which the bins lie, shape (BINS + 1,), float32."""
    return ((torch.arange(BINS + 1) + FIRST) << SHIFT).to(torch.int32).view(torch.float32)


def histogram(scores: Tensor) -> Tensor:
    """Return the counts of ``scores`` (any shape, float32, not negative), shape (BINS,), int64."""
    return torch.bincount(bin_of(scores).flatten(), minlength=BINS)


def cumulative(counts: Tensor) -> Tensor:
    """Return the share of scores below each bin edge, shape (..., BINS + 1), float64.

    Args:
        counts: shape (..., BINS), int64.
    """
    total = counts.sum(-1, keepdim=True).clamp(min=1)
    shares = counts.double().cumsum(-1) / total
    return torch.cat([torch.zeros_like(shares[..., :1]), shares], dim=-1)


def share_below(cumulated: Tensor, values: Tensor) -> Tensor:
    """Return, for each row, the share of its scores below a value, linear within a bin.

    Args:
        cumulated: from ``cumulative``, shape (rows, BINS + 1).
        values: shape (rows,), not negative.
    """
    position = values.float().view(torch.int32).double() / 2**SHIFT - FIRST
    position = position.clamp(0, BINS)
    below = position.floor().clamp(max=BINS - 1).long()[:, None]
    low, high = cumulated.gather(1, below)[:, 0], cumulated.gather(1, below + 1)[:, 0]
    share: Tensor = low + (high - low) * (position - below[:, 0])
    return share


def value_at(cumulated: Tensor, shares: Tensor) -> Tensor:
    """Return, for each row, the value that has the given share of scores below it.

    A share of 0 gives 0, which drops nothing. The inverse of ``share_below``.

    Args:
        cumulated: from ``cumulative``, shape (rows, BINS + 1).
        shares: shape (rows,), in [0, 1].
    """
    shares = shares.to(cumulated)[:, None].contiguous()
    upper = torch.searchsorted(cumulated.contiguous(), shares).clamp(1, BINS)
    low, high = cumulated.gather(1, upper - 1), cumulated.gather(1, upper)
    within = ((shares - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    bits = ((upper - 1 + within + FIRST) * 2**SHIFT).round().to(torch.int32)
    values: Tensor = torch.where(shares > 0, bits.view(torch.float32), 0.0)
    return values[:, 0]
