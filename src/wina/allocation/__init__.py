"""Allocation: how a target sparsity is shared among the linears of a model.

An allocation maps statistics and a target to a sparsity for each linear. What that means for a
token is up to the selection: a threshold at that quantile of the linear's scores, or top-k.
"""

from wina.allocation.base import Allocator, allocations
from wina.allocation.build import build_plan
from wina.allocation.globally import allocate_globally, loss_scale
from wina.allocation.greedy import allocate_greedily, greedy_path
from wina.allocation.uniform import allocate_uniformly

__all__ = [
    "Allocator",
    "allocate_globally",
    "allocate_greedily",
    "allocate_uniformly",
    "allocations",
    "build_plan",
    "greedy_path",
    "loss_scale",
]
