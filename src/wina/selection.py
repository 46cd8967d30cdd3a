"""Selections: which channels of a token stay, given their scores.

``threshold`` compares with a calibrated number and is what kernels run; ``topk`` keeps exactly k
channels of every token and is the paper's evaluation mode.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from wina.errors import UsageError

Selection = Literal["threshold", "topk"]


def check_selection(name: str) -> Selection:
    """Return ``name`` if it is a selection, else raise UsageError."""
    for known in get_args(Selection):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise UsageError(f"unknown selection {name!r}; known: {', '.join(get_args(Selection))}")


def threshold_mask(x: Tensor, thresholds: Tensor) -> Tensor:
    """Return True where a channel stays: not |x_j| < t_j, so that NaN stays and is seen.

    Args:
        x: inputs, shape (..., in_features), any float dtype.
        thresholds: shape (in_features,), float32.
    """
    return ~(x.abs().float() < thresholds)


def topk_mask(x: Tensor, scale: Tensor, keep: int) -> Tensor:
    """Return True for the ``keep`` channels of each token with the largest |x_j| * s_j.

    Ties are broken by torch.topk; NaN counts as largest, so it stays.

    Args:
        x: inputs, shape (..., in_features), any float dtype.
        scale: s_j, shape (in_features,), float32.
        keep: channels kept, 0 <= keep <= in_features.
    """
    scores = x.abs().float() * scale
    kept = scores.topk(keep, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def channels_kept(in_features: int, sparsity: float) -> int:
    """Return k for top-k: in_features * (1 - sparsity), rounded to the nearest channel."""
    return round(in_features * (1.0 - sparsity))


def check_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it lies in [0, 1), else raise UsageError."""
    if not 0.0 <= sparsity < 1.0:
        raise UsageError(
            f"sparsity must lie in [0, 1): the share of weights not touched; got {sparsity}"
        )
    return float(sparsity)
