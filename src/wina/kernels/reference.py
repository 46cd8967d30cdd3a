"""The oracle: plain torch, on any device and dtype. Every other backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sparse_linear(x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
    """Return W (mask o x) + b, where channel j of a row is dropped iff |x_j| < t_j.

    NaN is not below anything, so it stays and is seen; thresholds of 0 drop nothing.

    Args:
        x: inputs, shape (..., in_features), any float dtype.
        weight: W, shape (out_features, in_features), any strides, x's dtype.
        thresholds: t, shape (in_features,), float32.
        bias: b, shape (out_features,), x's dtype, or None.
    """
    return functional.linear(torch.where(x.abs().float() < thresholds, 0, x), weight, bias)
