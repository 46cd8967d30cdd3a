"""The CUDA backend: kernels in CUDA C++ for Hopper and later, compiled at run time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from wina.kernels import reference, triton
from wina.kernels.cuda import rows
from wina.kernels.cuda.attention import attention_step, decode_attention
from wina.kernels.cuda.gate import gate
from wina.kernels.cuda.likely import most_likely
from wina.kernels.cuda.table import config_for

__all__ = [
    "attention_step",
    "decode_attention",
    "flagged_linears",
    "gated_mlp",
    "linears",
    "load",
    "most_likely",
    "skips",
]

CAPABILITY = (9, 0)  # clusters of blocks, and launches that overlap


@cache
def load() -> str | None:
    """Return None, or why the kernels cannot run here; they are registered by wina.kernels.gpu."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY or torch.version.cuda is None:
        return f"it needs compute capability 9.0 (Hopper) or later; the device's is {found}"
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError:
        return "cuda-bindings is not installed (extra gpu)"
    return None


def skips(x: Tensor, outputs: Sequence[int], gated: bool) -> bool:
    """Return whether rows are skipped for this many rows of x; else a dense product serves."""
    return config_for(x, outputs, gated) is not None


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
    config = _config(x, weights, thresholds, norm, gated=False)
    if config is not None:
        return rows.rows(
            x, weights, thresholds, biases, config, norm=norm, epsilon=epsilon, residual=residual
        )
    if norm is not None:
        x = reference.rms_norm(x, norm, epsilon)
    results = triton.masked_product(x, weights, thresholds, biases)
    if results is None:
        results = [
            functional.linear(kept, weight, bias)
            for kept, weight, bias in zip(_gate(x, thresholds), weights, biases, strict=True)
        ]
    if residual is not None:
        results[0] = residual + results[0]
    return results


def flagged_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    flags: Tensor,
) -> Tensor | None:
    """Return W drop(x) + b of all projections side by side in one launch; None if it does not pay.

    Args:
        x: shape (rows, inputs).
        weights: as of ``linears``.
        thresholds: likewise.
        biases: likewise.
        flags: False for rows that nothing is dropped of, shape (rows,), bool.
    """
    config = _config(x, weights, thresholds, None, gated=False)
    if config is None:
        return None
    out = x.new_empty(len(x), sum(weight.shape[0] for weight in weights))
    rows.rows(x, weights, thresholds, biases, config, flags=flags, out=out)
    return out


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
    """Return ``reference.fused_gated_mlp``: gate and up in one launch, down in another."""
    gate_and_up, vectors = weights[:2], thresholds[:2]
    config = None
    if weights[0].shape == weights[1].shape:
        config = _config(x, gate_and_up, vectors, norm, gated=True)
    if config is not None:
        (hidden,) = rows.rows(
            x,
            gate_and_up,
            vectors,
            biases[:2],
            config,
            activation=activation,
            norm=norm,
            epsilon=epsilon,
        )
    else:
        found = linears(x, gate_and_up, vectors, biases[:2], norm, epsilon)
        hidden = reference.ACTIVATIONS[activation](found[0]) * found[1]
    return linears(hidden, weights[2:], thresholds[2:], biases[2:], residual=residual)[0]


def _config(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    norm: Tensor | None,
    *,
    gated: bool,
) -> rows.Config | None:
    """Return how to skip rows; None where a dense product must serve or is faster."""
    if len(weights) > rows.MOST or not rows.fits(x, weights, thresholds, norm):
        return None
    outputs = [weight.shape[0] for weight in (weights[:1] if gated else weights)]
    return config_for(x, outputs, gated)


def _gate(x: Tensor, thresholds: Sequence[Tensor]) -> list[Tensor]:
    if len(thresholds) > rows.MOST:
        return [reference.drop(x, vector) for vector in thresholds]
    return gate(x, thresholds)
