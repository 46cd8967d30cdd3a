"""Statistics of one linear's inputs: kilobytes, mergeable, and enough for any target sparsity."""

from wina.statistics import experts
from wina.statistics.histogram import (
    BINS,
    bin_edges,
    bin_of,
    cumulative,
    histogram,
    share_below,
    value_at,
)
from wina.statistics.linear import LinearStatistics

__all__ = [
    "BINS",
    "LinearStatistics",
    "bin_edges",
    "bin_of",
    "cumulative",
    "experts",
    "histogram",
    "share_below",
    "value_at",
]
