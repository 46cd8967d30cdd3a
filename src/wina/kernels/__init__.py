"""Kernels: y = W (mask o x) + b, computed by whichever backend is fastest where it runs."""

from wina.kernels.backends import active_backend, available_backends, use_backend
from wina.kernels.ops import (
    decode_attention,
    dense_linear,
    drop_each,
    most_likely,
    sparse_gated_mlp,
    sparse_linear,
    sparse_linears,
)
from wina.kernels.processor import multiplies
from wina.kernels.quantized import QuantizedWeight, pack, quantized_linear

__all__ = [
    "QuantizedWeight",
    "active_backend",
    "available_backends",
    "decode_attention",
    "dense_linear",
    "drop_each",
    "most_likely",
    "multiplies",
    "pack",
    "quantized_linear",
    "sparse_gated_mlp",
    "sparse_linear",
    "sparse_linears",
    "use_backend",
]
