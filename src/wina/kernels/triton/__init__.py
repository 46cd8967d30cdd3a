"""The Triton backend: y = W drop(x) for a few tokens on any GPU that Triton knows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wina.kernels import reference

MOST = 4  # rows of x up to which rows of W are skipped
TILES = (16, 32, 64)  # rows of x of a program of the masked product


@cache
def load() -> str | None:
    """Return None, or why the kernels cannot run here; they are registered by wina.kernels.gpu."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU"
    return None


def skips(x: Tensor, outputs: Sequence[int], gated: bool) -> bool:
    """Return whether rows are skipped for this many rows of x; else a dense product serves."""
    del outputs, gated
    return x.numel() <= MOST * x.shape[-1]


def masked_product(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    **options: Any,
) -> list[Tensor] | None:
    """Return ``product.masked_product``; None where a product on a masked copy of x must serve."""
    if importlib.util.find_spec("triton") is None:
        return None
    from wina.kernels.triton import product

    if not product.serves(x, weights, thresholds):
        return None
    return product.masked_product(x, weights, thresholds, biases, **options)


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Return ``reference.fused_linears``."""
    if norm is not None:
        x = reference.rms_norm(x, norm, epsilon)
    results = [
        _linear(x, weight, vector, bias)
        for weight, vector, bias in zip(weights, thresholds, biases, strict=True)
    ]
    if residual is not None:
        results[0] = residual + results[0]
    return results


def gated_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    activation: str,
    biases: Sequence[Tensor | None],
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Return ``reference.fused_gated_mlp``."""
    gate, up = linears(x, weights[:2], thresholds[:2], biases[:2], norm, epsilon)
    hidden = reference.ACTIVATIONS[activation](gate) * up
    return linears(hidden, weights[2:], thresholds[2:], biases[2:], residual=residual)[0]


attention_step = reference.attention_step
most_likely = reference.most_likely
decode_attention = reference.decode_attention  # torch's own matrix products serve here


def _linear(x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
    from wina.kernels.triton.rows import rows

    few = 0 < x.numel() <= MOST * x.shape[-1] and weight.numel() > 0
    if not few or weight.stride(0) != 1 or weight.dtype != x.dtype or x.dtype == torch.float64:
        return functional.linear(reference.drop(x, thresholds), weight, bias)
    return rows(x, weight, thresholds, bias)
