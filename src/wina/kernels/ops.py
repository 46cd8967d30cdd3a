"""The kernels as torch operators: opaque to torch.compile, the same names on every device.

The reference implements them for any device; a backend overrides it for its own. The operators
compute no gradient: where one is asked for, the functions below compute with the reference, whose
gradient reaches the kept channels and the weights (tuning has its own form of the gate).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wina.errors import UsageError
from wina.kernels import backends, quantized, reference
from wina.kernels.packing import only, pack_biases, unpack_biases

NAMESPACE = "wina"

# What may be absent is a list: wina.kernels.packing.
SCHEMAS = {
    "sparse_linear": "(Tensor x, Tensor weight, Tensor thresholds, Tensor[] bias) -> Tensor",
    "sparse_linears": (
        "(Tensor x, Tensor[] weights, Tensor[] thresholds, Tensor[] biases) -> Tensor[]"
    ),
    "sparse_gated_mlp": (
        "(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor gate_thresholds, "
        "Tensor up_thresholds, Tensor down_thresholds, str activation, Tensor[] biases) -> Tensor"
    ),
    "fused_linears": (
        "(Tensor x, Tensor[] norm, float epsilon, Tensor[] weights, Tensor[] thresholds, "
        "Tensor[] biases, Tensor[] residual) -> Tensor[]"
    ),
    "fused_gated_mlp": (
        "(Tensor x, Tensor[] norm, float epsilon, Tensor[] weights, Tensor[] thresholds, "
        "str activation, Tensor[] biases, Tensor[] residual) -> Tensor"
    ),
    "dense_linear": "(Tensor x, Tensor weight, Tensor[] bias) -> Tensor",
    "drop_each": "(Tensor x, Tensor thresholds) -> Tensor",
    "decode_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor"
    ),
    "attention_step": (
        "(Tensor query, Tensor new_key, Tensor new_value, Tensor cos, Tensor sin, "
        "Tensor(a!) key, Tensor(b!) value, Tensor length, Tensor mask, float scale) -> Tensor"
    ),
    "both": "(Tensor cos, Tensor sin) -> Tensor",
    "kept": "(Tensor x) -> Tensor",
    "most_likely": "(Tensor logits) -> Tensor",
}
# What only the CPU library computes: a row of decoder blocks, made known under a number
# (wina.kernels.blocks).
BLOCK_SCHEMAS = {
    "add_block": (
        "(int number, Tensor[] norm, float epsilon, Tensor[] weights, Tensor[] thresholds, "
        "Tensor[] biases, Tensor[] cache, float scale, Tensor[] out_weight, "
        "Tensor[] out_thresholds, Tensor[] out_bias, Tensor[] mlp_norm, float mlp_epsilon, "
        "Tensor[] mlp_weights, Tensor[] mlp_thresholds, str activation, Tensor[] mlp_biases) -> ()"
    ),
    "decode_blocks": "(Tensor x, Tensor cos, Tensor sin, Tensor mask, int number) -> Tensor",
}


def sparse_linear(
    x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return W drop(x) + b; shapes and dtypes as in wina.kernels.reference.

    A weight whose strides are (1, out_features), stored input-major, lets a kernel skip the
    dropped channels' memory; any other layout is computed densely on the masked input.
    """
    if _needs_reference(x, weight, bias):
        return reference.sparse_linear(x, weight, thresholds, bias)
    biases = [] if bias is None else [bias]
    result: Tensor = torch.ops.wina.sparse_linear(x, weight, thresholds, biases)
    return result


def sparse_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Return ``sparse_linear`` of one x under several projections (q, k, v), in one call."""
    if _needs_reference(x, *weights, *(biases or ())):
        return reference.sparse_linears(x, weights, thresholds, biases)
    results: list[Tensor] = torch.ops.wina.sparse_linears(
        x, list(weights), list(thresholds), pack_biases(x, biases or ())
    )
    return results


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
    """Return down(act(gate(x)) * up(x)), each projection with its own thresholds, in one call.

    Raises:
        UsageError: the activation is not one of ``reference.ACTIVATIONS``.
    """
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise UsageError(f"unknown activation {activation!r} of a gated MLP. Known: {known}.")
    weights = (gate, up, down)
    thresholds = (gate_thresholds, up_thresholds, down_thresholds)
    biases = (gate_bias, up_bias, down_bias)
    if _needs_reference(x, *weights, *biases):
        return reference.sparse_gated_mlp(x, *weights, *thresholds, activation, *biases)
    packed = pack_biases(x, biases)
    result: Tensor = torch.ops.wina.sparse_gated_mlp(x, *weights, *thresholds, activation, packed)
    return result


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return W x + b; on the CPU up to 4 rows read a weight of any layout at memory's speed.

    (``functional.linear`` takes twice that time for a few rows of bfloat16.)
    """
    if _needs_reference(x, weight, bias):
        return functional.linear(x, weight, bias)
    result: Tensor = torch.ops.wina.dense_linear(x, weight, [] if bias is None else [bias])
    return result


def drop_each(x: Tensor, thresholds: Tensor) -> Tensor:
    """Return x as each of several projections sees it, shape (projections, rows, in_features).

    Args:
        x: shape (rows, in_features).
        thresholds: shape (projections, in_features), float32.
    """
    if _needs_reference(x):
        return _drop_each(x, thresholds)
    result: Tensor = torch.ops.wina.drop_each(x, thresholds)
    return result


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale q k^T, where mask) v for one position; see the reference."""
    if _needs_reference(query, key, value):
        return reference.decode_attention(query, key, value, mask, scale)
    result: Tensor = torch.ops.wina.decode_attention(query, key, value, mask, scale)
    return result


def most_likely(logits: Tensor) -> Tensor:
    """Return the place of each row's largest logit, int64 (batch,), as ``argmax`` does."""
    if logits.dtype == torch.float64 or _needs_reference(logits):
        return logits.argmax(-1)
    result: Tensor = torch.ops.wina.most_likely(logits)
    return result


def _needs_reference(*tensors: Tensor | None) -> bool:
    """Return whether the reference was asked for, or a gradient."""
    if backends.active_backend() == backends.REFERENCE:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def reference_linear(x: Tensor, weight: Tensor, thresholds: Tensor, bias: list[Tensor]) -> Tensor:
    """Compute ``sparse_linear`` in plain torch, arguments as the operator's."""
    return reference.sparse_linear(x, weight, thresholds, *unpack_biases(bias, 1))


def reference_linears(
    x: Tensor, weights: list[Tensor], thresholds: list[Tensor], biases: list[Tensor]
) -> list[Tensor]:
    """Compute ``sparse_linears`` in plain torch, arguments as the operator's."""
    return reference.sparse_linears(x, weights, thresholds, unpack_biases(biases, len(weights)))


def reference_gated_mlp(
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
    """Compute ``sparse_gated_mlp`` in plain torch, arguments as the operator's."""
    thresholds = (gate_thresholds, up_thresholds, down_thresholds)
    return reference.sparse_gated_mlp(
        x, gate, up, down, *thresholds, activation, *unpack_biases(biases, 3)
    )


def _fused_linears(
    x: Tensor,
    norm: list[Tensor],
    epsilon: float,
    weights: list[Tensor],
    thresholds: list[Tensor],
    biases: list[Tensor],
    residual: list[Tensor],
) -> list[Tensor]:
    found = unpack_biases(biases, len(weights))
    first = (only(norm), epsilon)
    return reference.fused_linears(x, *first, weights, thresholds, found, only(residual))


def _fused_gated_mlp(
    x: Tensor,
    norm: list[Tensor],
    epsilon: float,
    weights: list[Tensor],
    thresholds: list[Tensor],
    activation: str,
    biases: list[Tensor],
    residual: list[Tensor],
) -> Tensor:
    rest = (activation, unpack_biases(biases, 3), only(residual))
    return reference.fused_gated_mlp(x, only(norm), epsilon, weights, thresholds, *rest)


def _fake_fused_linears(
    x: Tensor, norm: list[Tensor], epsilon: float, weights: list[Tensor], *rest: object
) -> list[Tensor]:
    del norm, epsilon, rest
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _fake_fused_mlp(
    x: Tensor, norm: list[Tensor], epsilon: float, weights: list[Tensor], *rest: object
) -> Tensor:
    del norm, epsilon, rest
    return x.new_empty((*x.shape[:-1], weights[2].shape[0]))


def _fake_linear(x: Tensor, weight: Tensor, thresholds: Tensor, bias: list[Tensor]) -> Tensor:
    del thresholds, bias
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linears(
    x: Tensor, weights: list[Tensor], thresholds: list[Tensor], biases: list[Tensor]
) -> list[Tensor]:
    del thresholds, biases
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _fake_gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *rest: object) -> Tensor:
    del gate, up, rest
    return x.new_empty((*x.shape[:-1], down.shape[0]))


def _dense(x: Tensor, weight: Tensor, bias: list[Tensor]) -> Tensor:
    return functional.linear(x, weight, *unpack_biases(bias, 1))


def _fake_dense(x: Tensor, weight: Tensor, bias: list[Tensor]) -> Tensor:
    del bias
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _drop_each(x: Tensor, thresholds: Tensor) -> Tensor:
    return reference.drop(x, thresholds[:, None])


def _fake_drop_each(x: Tensor, thresholds: Tensor) -> Tensor:
    return x.new_empty((thresholds.shape[0], *x.shape))


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    del key, mask, scale
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _attention_step(*arguments: Any) -> Tensor:
    return reference.attention_step(*arguments)


def _fake_step(query: Tensor, new_key: Tensor, new_value: Tensor, *rest: object) -> Tensor:
    del new_key, rest
    return query.new_empty((*query.shape[:3], new_value.shape[3]))


def _both(cos: Tensor, sin: Tensor) -> Tensor:
    return torch.stack((cos, sin))


def _kept(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _most_likely(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _fake_most_likely(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _fake_blocks(x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, number: int) -> Tensor:
    del cos, sin, mask, number
    return x.new_empty(x.shape)


def _define() -> None:
    implementations: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
        "sparse_linear": (reference_linear, _fake_linear),
        "sparse_linears": (reference_linears, _fake_linears),
        "sparse_gated_mlp": (reference_gated_mlp, _fake_gated_mlp),
        "fused_linears": (_fused_linears, _fake_fused_linears),
        "fused_gated_mlp": (_fused_gated_mlp, _fake_fused_mlp),
        "dense_linear": (_dense, _fake_dense),
        "drop_each": (_drop_each, _fake_drop_each),
        "decode_attention": (reference.decode_attention, _fake_attention),
        "attention_step": (_attention_step, _fake_step),
        # An operator's result is computed once by the compiler, whatever reads it.
        "both": (_both, _both),
        "kept": (_kept, _kept),
        "most_likely": (_most_likely, _fake_most_likely),
    }
    for name, (implementation, fake) in implementations.items():
        op = f"{NAMESPACE}::{name}"
        torch.library.define(op, SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(op, "CompositeExplicitAutograd", implementation)
        torch.library.register_fake(op, fake)
    for name, schema in BLOCK_SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.library.register_fake(f"{NAMESPACE}::decode_blocks", _fake_blocks)


_define()
quantized.define()
backends.load_own()
