"""TEAL: |x_j| alone (arXiv 2408.14690)."""

import torch
from torch import Tensor

from wina.criteria.base import Criterion, LinearFacts, register


def ones(facts: LinearFacts) -> Tensor:
    """s_j = 1."""
    return torch.ones_like(facts.column_norm)


TEAL = register(Criterion("teal", ones))
