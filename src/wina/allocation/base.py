"""What an allocation is, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from wina.criteria import Criterion
from wina.registry import Registry
from wina.statistics import LinearStatistics

# (statistics of each linear, criterion, target) -> sparsity of each linear, float64, in order.
Allocator = Callable[[Sequence[LinearStatistics], Criterion, float], Tensor]

allocations: Registry[Allocator] = Registry("allocation", "allocations")
