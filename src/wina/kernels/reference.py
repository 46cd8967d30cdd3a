"""The oracle: plain torch, on any device and dtype. Every other backend is tested against it.

Terms used throughout: ``x`` has shape (..., in_features) and any float dtype; a ``weight`` is W,
shape (out_features, in_features), any strides, x's dtype; ``thresholds`` is t, shape
(in_features,), float32; a ``bias`` has shape (out_features,) and x's dtype. Channel j of a row of
x is dropped iff |x_j| < t_j, compared in float32. NaN is not below anything, so it stays and is
seen; a threshold of 0 drops nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

MOST_PARTS, FEWEST_PARTS = 512, 16  # of a vocabulary, each looked at by one block of a GPU
CHUNK = 512  # positions of attention in one batch of a matrix product
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def drop(x: Tensor, thresholds: Tensor) -> Tensor:
    """Return x with the dropped channels set to zero, shape and dtype of x."""
    return torch.where(x.abs().float() < thresholds, 0, x)


def sparse_linear(
    x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return W drop(x) + b, shape (..., out_features), in x's dtype."""
    return functional.linear(drop(x, thresholds), weight, bias)


def sparse_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Return ``sparse_linear`` of one x under each projection, in order."""
    biases = [None] * len(weights) if biases is None else biases
    return [
        sparse_linear(x, weight, vector, bias)
        for weight, vector, bias in zip(weights, thresholds, biases, strict=True)
    ]


def sparse_gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_thresholds: Tensor,
    up_thresholds: Tensor,
    down_thresholds: Tensor,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Return down(act(gate(x)) * up(x)), each projection with its own thresholds.

    Every intermediate result is rounded to x's dtype, as in the dense model.
    """
    hidden = ACTIVATIONS[activation](sparse_linear(x, gate, gate_thresholds, gate_bias))
    hidden = hidden * sparse_linear(x, up, up_thresholds, up_bias)
    return sparse_linear(hidden, down, down_thresholds, down_bias)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return RMSNorm of x (..., in_features), rounded as Llama's in Transformers is."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def fused_linears(
    x: Tensor,
    norm: Tensor | None,
    epsilon: float,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Return ``sparse_linears`` of an x that is normed first, the residual added to the first."""
    x = x if norm is None else rms_norm(x, norm, epsilon)
    results = sparse_linears(x, weights, thresholds, biases)
    if residual is not None:
        results[0] = residual + results[0]
    return results


def fused_gated_mlp(
    x: Tensor,
    norm: Tensor | None,
    epsilon: float,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    activation: str = "silu",
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return ``sparse_gated_mlp`` of an x that is normed first, with the residual added."""
    x = x if norm is None else rms_norm(x, norm, epsilon)
    gate, up, down = weights
    vectors = (thresholds[0], thresholds[1], thresholds[2])
    others = biases or (None, None, None)
    result = sparse_gated_mlp(
        x, gate, up, down, *vectors, activation, others[0], others[1], others[2]
    )
    return result if residual is None else residual + result


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale q k^T, where mask) v for one position.

    Args:
        query: shape (batch, heads, 1, size).
        key: shape (batch, key heads, positions, size); heads is a multiple of key heads.
        value: shape (batch, key heads, positions, value size).
        mask: True where the query sees, shape (batch or 1, 1, 1, positions).
        scale: of the scores.

    Returns:
        Shape (batch, heads, 1, value size), the query's dtype.
    """
    batch, heads, _, size = query.shape
    shared, positions = key.shape[1], key.shape[2]
    grouped = query.view(batch, shared, heads // shared, size)
    scores = torch.matmul(grouped, key.transpose(2, 3)).float() * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype)
    if query.device.type == "cpu" or positions % CHUNK or positions == CHUNK:
        found = torch.matmul(weights, value)
    else:  # more blocks for a GPU than there are heads
        parts = positions // CHUNK
        split = weights.view(batch, shared, heads // shared, parts, CHUNK).transpose(2, 3)
        found = torch.matmul(split, value.view(batch, shared, parts, CHUNK, -1))
        found = found.float().sum(2).to(value.dtype)
    return found.reshape(batch, heads, 1, -1)


def attention_step(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    length: Tensor,
    mask: Tensor,
    scale: float,
    attention: Callable[..., Tensor] = decode_attention,
) -> Tensor:
    """Rotate a new position's query and key, write key and value to the cache, and attend.

    Args:
        query: as projected, shape (batch, heads, 1, size).
        new_key: as projected, shape (batch, key heads, 1, size).
        new_value: shape (batch, key heads, 1, value size).
        cos: of the rotation, shape (batch or 1, 1, rotated), the query's dtype: that many of a
            head's numbers are rotated, the first half of them with the second.
        sin: likewise.
        key: the cache, shape (batch, key heads, positions, size); written in place.
        value: the cache, shape (batch, key heads, positions, value size); written in place.
        length: positions before the new one, int64, one number; they are less than ``positions``.
        mask: True where the query sees, shape (batch or 1, 1, 1, positions); at the new position
            it does, and after it it does not, whatever the mask says.
        scale: of the scores.
        attention: computes ``decode_attention``.

    Returns:
        Shape (batch, heads, 1, value size), the query's dtype.
    """
    place = length.reshape(1)
    key.index_copy_(2, place, rotated(new_key, cos, sin))
    value.index_copy_(2, place, new_value)
    positions = torch.arange(key.shape[2], device=key.device)
    seen = (mask & (positions < place)) | (positions == place)
    return attention(rotated(query, cos, sin), key, value, seen, scale)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads under a rotary embedding over halves, rounded as Transformers rounds it.

    Args:
        x: shape (batch, heads, 1, size).
        cos: shape (batch or 1, 1, rotated).
        sin: likewise.
    """
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, -1)
    swapped = torch.cat((-high, low), -1)
    return torch.cat((turned * cos[:, None] + swapped * sin[:, None], rest), -1)


def most_likely(logits: Tensor) -> Tensor:
    """Return ``logits.argmax(-1)``, the first of equals as there, in two rounds.

    torch gives a whole row to one block of a GPU, which takes 27 us for 128,256 logits on an H100,
    as long as reading 80 MB of weights.
    """
    *rows, vocabulary = logits.shape
    parts = math.gcd(vocabulary, MOST_PARTS)
    if parts < FEWEST_PARTS:
        return logits.argmax(-1)
    highest, places = logits.reshape(*rows, parts, vocabulary // parts).max(-1)
    part = highest.argmax(-1, keepdim=True)
    return (part * (vocabulary // parts) + places.gather(-1, part)).squeeze(-1)
