"""The operators on CUDA devices: whichever GPU backend can run there, else the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wina.kernels import backends, cuda, triton
from wina.kernels.cuda import quantized
from wina.kernels.packing import only, unpack_biases
from wina.kernels.quantized import QuantizedWeight, weights_of

CUDA, TRITON = "cuda", "triton"
# Rows up to which skipping beats a masked product where neither norm nor residual is part of it:
# four rows with masks of their own keep 94 % of the channels at 50 % (docs/kernels.md).
SKIPPED = 3


def fused_linears(
    x: Tensor,
    norm: list[Tensor],
    epsilon: float,
    weights: list[Tensor],
    thresholds: list[Tensor],
    biases: list[Tensor],
    residual: list[Tensor],
) -> list[Tensor]:
    """Return ``reference.fused_linears``."""
    arguments = (x, weights, thresholds, unpack_biases(biases, len(weights)))
    results: list[Tensor] = _backend().linears(*arguments, only(norm), epsilon, only(residual))
    return results


def fused_gated_mlp(
    x: Tensor,
    norm: list[Tensor],
    epsilon: float,
    weights: list[Tensor],
    thresholds: list[Tensor],
    activation: str,
    biases: list[Tensor],
    residual: list[Tensor],
) -> Tensor:
    """Return ``reference.fused_gated_mlp``."""
    arguments = (x, weights, thresholds, activation, unpack_biases(biases, 3))
    result: Tensor = _backend().gated_mlp(*arguments, only(norm), epsilon, only(residual))
    return result


def sparse_linear(x: Tensor, weight: Tensor, thresholds: Tensor, bias: list[Tensor]) -> Tensor:
    """Return ``reference.sparse_linear``."""
    result: Tensor = _backend().linears(x, [weight], [thresholds], unpack_biases(bias, 1))[0]
    return result


def sparse_linears(
    x: Tensor, weights: list[Tensor], thresholds: list[Tensor], biases: list[Tensor]
) -> list[Tensor]:
    """Return ``reference.sparse_linears``."""
    found = unpack_biases(biases, len(weights))
    results: list[Tensor] = _backend().linears(x, weights, thresholds, found)
    return results


def sparse_gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_thresholds: Tensor,
    up_thresholds: Tensor,
    down_thresholds: Tensor,
    activation: str,
    biases: list[Tensor],
) -> Tensor:
    """Return ``reference.sparse_gated_mlp``."""
    thresholds = [gate_thresholds, up_thresholds, down_thresholds]
    arguments = (x, [gate, up, down], thresholds, activation, unpack_biases(biases, 3))
    result: Tensor = _backend().gated_mlp(*arguments)
    return result


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Return ``reference.decode_attention``."""
    result: Tensor = _backend().decode_attention(query, key, value, mask, scale)
    return result


def attention_step(*arguments: Any) -> Tensor:
    """Return ``reference.attention_step``."""
    result: Tensor = _backend().attention_step(*arguments)
    return result


def most_likely(logits: Tensor) -> Tensor:
    """Return ``logits.argmax(-1)``, the first of equals as there."""
    result: Tensor = _backend().most_likely(logits)
    return result


def skips(x: Tensor, outputs: Sequence[int], *, gated: bool) -> bool:
    """Return whether the kernels skip rows for this many rows of x; fake tensors serve too.

    Args:
        x: shape (..., inputs), CUDA.
        outputs: of each projection; of the gate where ``gated``.
        gated: act(gate) * up.
    """
    result: bool = _backend().skips(x, outputs, gated)
    return result


def flagged_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    flags: Tensor,
    sparse_biases: Sequence[Tensor | None],
) -> Tensor | None:
    """Return the projections side by side in one launch; None where no kernel does that.

    Args:
        x: shape (rows, inputs).
        weights: input-major, shape (outputs, inputs), one of each projection.
        thresholds: shape (inputs,), float32, likewise.
        biases: shape (outputs,) or None, likewise.
        flags: True for rows of which channels are dropped, shape (rows,), bool.
        sparse_biases: as ``biases``, added to those rows alone.

    Returns:
        Shape (rows, all outputs).
    """

    def skipped() -> Tensor | None:
        if _backend() is not cuda or any(bias is not None for bias in sparse_biases):
            return None
        return cuda.flagged_linears(x, weights, thresholds, biases, flags)

    def masked() -> Tensor | None:
        out = x.new_empty(len(x), sum(weight.shape[0] for weight in weights))
        found = triton.masked_product(
            x, weights, thresholds, biases, flags=flags, sparse_biases=sparse_biases, out=out
        )
        return None if found is None else out

    ways = (skipped, masked) if len(x) <= SKIPPED else (masked, skipped)
    return next((found for way in ways if (found := way()) is not None), None)


def quantized_linear(
    x: Tensor, weight: list[Tensor], thresholds: Tensor, bias: list[Tensor]
) -> Tensor:
    """Return W drop(x) + b of a quantized weight."""
    found = QuantizedWeight(*weight)
    return quantized.linears(x, [found], [thresholds], unpack_biases(bias, 1))[0]


def flagged_quantized_linears(
    x: Tensor,
    weights: Sequence[QuantizedWeight],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    flags: Tensor,
    sparse_biases: Sequence[Tensor | None],
) -> Tensor | None:
    """Return ``flagged_linears`` of quantized weights; None where no kernel does that."""
    if _backend() is not cuda:
        return None
    return quantized.flagged_linears(x, weights, thresholds, biases, flags, sparse_biases)


def quantized_linears(
    x: Tensor,
    norm: list[Tensor],
    epsilon: float,
    weights: list[Tensor],
    thresholds: list[Tensor],
    biases: list[Tensor],
    residual: list[Tensor],
) -> list[Tensor]:
    """Return ``fused_linears`` of quantized weights."""
    found = unpack_biases(biases, len(thresholds))
    rest = (found, only(norm), epsilon, only(residual))
    return quantized.linears(x, weights_of(weights), thresholds, *rest)


def quantized_gated_mlp(
    x: Tensor,
    norm: list[Tensor],
    epsilon: float,
    weights: list[Tensor],
    thresholds: list[Tensor],
    activation: str,
    biases: list[Tensor],
    residual: list[Tensor],
) -> Tensor:
    """Return ``fused_gated_mlp`` of quantized weights."""
    rest = (unpack_biases(biases, 3), only(norm), epsilon, only(residual))
    return quantized.gated_mlp(x, weights_of(weights), thresholds, activation, *rest)


@cache
def register() -> None:
    """Give torch the implementations for CUDA tensors."""
    implementations: dict[str, Callable[..., Any]] = {
        "fused_linears": fused_linears,
        "fused_gated_mlp": fused_gated_mlp,
        "sparse_linear": sparse_linear,
        "sparse_linears": sparse_linears,
        "sparse_gated_mlp": sparse_gated_mlp,
        "decode_attention": decode_attention,
        "attention_step": attention_step,
        "most_likely": most_likely,
    }
    for name, implementation in implementations.items():
        torch.library.impl(f"wina::{name}", "CUDA", implementation)


def load_cuda() -> str | None:
    """Register the CUDA kernels; return None, or why they cannot run here."""
    reason = cuda.load()
    if reason is None:
        register()
        _register_quantized()
    return reason


@cache
def _register_quantized() -> None:
    # In CUDA C++ alone: with Triton the reference serves them.
    for function in (quantized_linear, quantized_linears, quantized_gated_mlp):
        torch.library.impl(f"wina::{function.__name__}", "CUDA", function)


def load_triton() -> str | None:
    """Register the Triton kernels; return None, or why they cannot run here."""
    reason = triton.load()
    if reason is None:
        register()
    return reason


def _backend() -> Any:
    forced = backends.active_backend()
    if forced == TRITON or (forced == backends.AUTO and backends.unavailable(CUDA) is not None):
        return triton
    return cuda
