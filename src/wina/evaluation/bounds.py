"""How far a measured loss may be off: one-sided 95 % bounds over windows of text.

Neighbouring tokens are alike, so the units are windows and not tokens. Differences to the dense
model are taken window by window, which removes how hard a window is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from wina.measures import Totals

CONFIDENCE = 0.95
FEWEST = 5  # windows; with fewer there is no bound


@dataclass(frozen=True)
class Bound:
    """An estimate and its one-sided upper bound; None if there are too few windows."""

    estimate: float
    upper: float | None


def perplexity_increase(windows: Sequence[Totals], confidence: float = CONFIDENCE) -> Bound:
    """Return perplexity / dense perplexity - 1."""
    nats = _per_position([x.nll - x.dense_nll for x in windows], windows, confidence)
    upper = None if nats.upper is None else _expm1(nats.upper)
    return Bound(_expm1(nats.estimate), upper)


def divergence(windows: Sequence[Totals], confidence: float = CONFIDENCE) -> Bound:
    """Return the mean KL(dense || sparse), nats a token."""
    return _per_position([x.divergence for x in windows], windows, confidence)


def student_t(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution.

    The expansion of Abramowitz and Stegun, 26.7.5; within 0.5 % for 0.95 and 4 degrees or more.
    """
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / 4 / freedom
        + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / freedom**2
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / freedom**3
    )


def _per_position(sums: Sequence[float], windows: Sequence[Totals], confidence: float) -> Bound:
    """Return sum / positions, and its bound by the ratio estimator's variance (linearized)."""
    positions = [x.positions for x in windows]
    total, count = sum(positions), len(windows)
    if not total:
        return Bound(math.nan, None)
    mean = math.fsum(sums) / total
    if count < FEWEST:
        return Bound(mean, None)
    residuals = [one - mean * size for one, size in zip(sums, positions, strict=True)]
    spread = math.fsum(x * x for x in residuals) * count / (count - 1)
    return Bound(mean, mean + student_t(confidence, count - 1) * math.sqrt(spread) / total)


def _expm1(value: float) -> float:
    try:
        return math.expm1(value)
    except OverflowError:
        return math.inf
