"""Selections: which channels of a token stay, given their scores.

``threshold`` compares with a calibrated number and is what kernels run; ``topk`` keeps exactly k
channels of every token and is the paper's evaluation mode.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from wina.errors import UsageError

Runnable = Literal["threshold", "topk"]
# What research compares with; costs more than it saves, so it is for scoring alone.
Selection = Literal["threshold", "topk", "random", "oracle"]
ORACLE_ROUNDS = 16
ORACLE_TRADED = 0.1  # of the pairs of a kept and a dropped channel


def check_selection(name: str) -> Selection:
    """Return ``name`` if it is a selection that models can run with, else raise UsageError."""
    for known in get_args(Runnable):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise UsageError(f"unknown selection {name!r}; known: {', '.join(get_args(Runnable))}")


def is_runnable(selection: Selection) -> bool:
    """Return whether a model can run with a selection outside scoring."""
    return selection in get_args(Runnable)


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


def random_mask(x: Tensor, keep: int) -> Tensor:
    """Return True for ``keep`` channels of each token, chosen by a hash of x's bits.

    Pseudo-random, the same for the same input, and without a state to keep.

    Args:
        x: inputs, shape (..., in_features), any float dtype.
        keep: channels kept, 0 <= keep <= in_features.
    """
    places = torch.arange(x.shape[-1], device=x.device) * 0x9E3779B1
    bits = (x.float().contiguous().view(torch.int32).long() ^ places) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finalizer
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    bits = bits ^ (bits >> 16)
    kept = bits.topk(keep, dim=-1, sorted=False).indices
    return torch.zeros_like(bits, dtype=torch.bool).scatter_(-1, kept, True)


def oracle_mask(x: Tensor, weight: Tensor, keep: int, rounds: int = ORACLE_ROUNDS) -> Tensor:
    """Return True for ``keep`` channels of each token, improved from norms by the exact error.

    With e the dropped part of x and G = W^T W, the squared error is e^T G e. Dropping a kept j as
    well changes it by x_j^2 G_jj + 2 x_j (G e)_j, and keeping a dropped i by
    x_i^2 G_ii - 2 x_i (G e)_i. From WINA's top-k on, each round trades the best pairs of a token,
    a tenth of what could be traded at first. Where that did not lower the token's error it is
    undone, and half as many are traded from then on: no token is worse than with norms.

    Args:
        x: inputs, shape (..., in_features), any float dtype.
        weight: W, shape (out_features, in_features).
        keep: channels kept, 0 <= keep <= in_features.
        rounds: of trading.
    """
    flat = x.reshape(-1, x.shape[-1]).float()
    gram = weight.float().T @ weight.float()
    own = flat.square() * gram.diag()
    mask = topk_mask(flat, gram.diag().sqrt(), keep)
    tradable = min(keep, flat.shape[-1] - keep)
    if tradable == 0:
        return mask.view(x.shape)
    pairs = max(1, int(ORACLE_TRADED * tradable))
    order = torch.arange(pairs, device=x.device)
    allowed = torch.full_like(flat[:, :1], pairs)
    least = torch.full_like(allowed, torch.inf)
    best, slope = mask, own
    for round_number in range(rounds + 1):
        dropped = torch.where(mask, 0, flat)
        field = dropped @ gram
        error = (dropped * field).sum(-1, keepdim=True)
        better = error < least
        best = torch.where(better, mask, best)
        slope = torch.where(better, 2 * flat * field, slope)
        least = torch.minimum(error, least)
        allowed = torch.where(better, allowed, (allowed / 2).floor())
        if round_number == rounds:
            break
        costs, out = (own + slope).masked_fill(~best, torch.inf).topk(pairs, largest=False)
        gains, back = (own - slope).masked_fill(best, torch.inf).topk(pairs, largest=False)
        traded = (order < allowed) & (costs + gains < 0)
        mask = best.scatter(-1, out, ~traded).scatter(-1, back, traded)
    return best.view(x.shape)


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
