"""What a criterion is, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from wina.registry import Registry


@dataclass(frozen=True)
class LinearFacts:
    """What is known of a linear y = W x before any token's score is computed.

    Attributes:
        kind: the projection's own name, such as ``k_proj``.
        column_norm: ||W_:j||_2, shape (in_features,), float32.
        gradient_rms: rms of dL/dx_j over tokens, weighted by x_j^2, through this linear alone; L
            is the summed negative log likelihood of the text in nats. Shape (in_features,),
            float32. None if it was not collected.
    """

    kind: str
    column_norm: Tensor
    gradient_rms: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """A way to score input channels.

    Attributes:
        name: what users type.
        scale: maps a linear's facts to s_j, shape (in_features,), float32, not negative.
        needs_gradient: ``scale`` reads ``gradient_rms``.
        comparable: scores of different linears are in one unit (nats), so that a global
            allocation may compare them as they are; otherwise it first measures a loss scale
            for each linear.
    """

    name: str
    scale: Callable[[LinearFacts], Tensor]
    needs_gradient: bool = False
    comparable: bool = False


criteria: Registry[Criterion] = Registry("criterion", "criteria")


def register(criterion: Criterion) -> Criterion:
    """Make a criterion known by its name."""
    return criteria.add(criterion.name, criterion)
