"""WINA: |x_j| * ||W_:j||_2 on every projection (arXiv 2505.19427, section 3)."""

from torch import Tensor

from wina.criteria.base import Criterion, LinearFacts, register


def column_norms(facts: LinearFacts) -> Tensor:
    """s_j = ||W_:j||_2: dropping channel j alone changes y by exactly |x_j| ||W_:j||_2."""
    return facts.column_norm


WINA = register(Criterion("wina", column_norms))
