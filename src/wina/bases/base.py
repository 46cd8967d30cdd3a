"""What a basis is, and the registry of ways to choose one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wina.registry import Registry

ZERO = 5e-7  # columns of a rotated weight below this share of the largest are zero but for rounding


@dataclass(frozen=True)
class Basis:
    """An orthogonal matrix Q and the scale d of the norm that is folded into the weights first.

    A linear y = W x becomes y = (W diag(d) Q) (Q^T (x / d)), exactly. With d the weight of the
    norm in front, x / d is the normalised hidden state, as if the norm's weight had been folded
    into W; with d = 1 nothing is folded.

    Attributes:
        matrix: Q, shape (features, features), float32.
        scale: d, shape (features,), float32, nowhere zero.
    """

    matrix: Tensor
    scale: Tensor

    def input_matrix(self, dtype: torch.dtype) -> Tensor:
        """Return M with x M = Q^T (x / d), shape (features, features)."""
        return (self.matrix.double() / self.scale.double()[:, None]).to(dtype)

    def rotate_weight(self, weight: Tensor) -> Tensor:
        """Return W diag(d) Q in W's shape (out_features, features) and dtype.

        Columns that are zero but for rounding become exactly zero.
        """
        rotated = (weight.double() * self.scale.double()) @ self.matrix.double()
        norms = rotated.norm(dim=0)
        return torch.where(norms > ZERO * norms.max(), rotated, 0).to(weight.dtype)


@dataclass(frozen=True)
class GroupFacts:
    """What is known of linears that share an input.

    Attributes:
        weight: of the group's leader (k_proj, gate_proj or the fused linear that holds them), the
            norm folded in: W diag(d), shape (out_features, features), float64.
        covariance: E[z z^T] of the inputs z = x / d over calibration tokens, not centred, shape
            (features, features), float64; None if it was not collected.
    """

    weight: Tensor
    covariance: Tensor | None = None


@dataclass(frozen=True)
class BasisMaker:
    """A way to choose a rotation.

    Attributes:
        name: what users type.
        matrix: maps a group's facts to Q, shape (features, features), float64, orthogonal.
        needs_covariance: ``matrix`` reads ``covariance``.
    """

    name: str
    matrix: Callable[[GroupFacts], Tensor]
    needs_covariance: bool = False


bases: Registry[BasisMaker] = Registry("basis", "bases")


def register(maker: BasisMaker) -> BasisMaker:
    """Make a way to choose a basis known by its name."""
    return bases.add(maker.name, maker)
