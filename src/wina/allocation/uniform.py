"""Uniform: every linear has the target sparsity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wina.allocation.base import allocations
from wina.criteria import Criterion
from wina.statistics import LinearStatistics


def allocate_uniformly(
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,  # noqa: ARG001
    target: float,
) -> Tensor:
    """Return the target for every linear."""
    return torch.full((len(statistics),), target, dtype=torch.float64)


allocations.add("uniform", allocate_uniformly)
