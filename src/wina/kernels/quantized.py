"""Sparse linears whose weights are 8- or 4-bit integers with scales: layout, oracle, operators.

The weight of input channel j and output o is s[g, o] (q[j, o] - z[g, o]), with g the group of
consecutive channels that j is in; groups are of one size (the whole input is one group: scales per
output channel). z is absent where the format is symmetric. 4-bit formats whose groups have a
minimum instead (GGUF's Q4_1) are s (q + 8) + m: then z holds m, of the scales' dtype.

Codes are stored input-major, so that a dropped channel's codes are one stretch of memory that is
not read. A group's scales (and zeros) are read if any of its channels lives.

A row of codes is a sequence of blocks of 64 bytes, each of 128 outputs of 4 bits or 64 of 8 bits.
Within a block the outputs are ordered as a kernel unpacks them: 16-bit word w = 8 l + 4 h + k
(l < 4, h < 2, k < 4) holds, lowest first, the outputs 16 (2 i + h) + 4 l + k for i = 0, 1, ..., in
nibbles (the code + 8) or bytes (the code). Interleaving the words of two channels' rows, lane by
lane of 128 bits, then gives 16 consecutive outputs in a 512-bit register, or 8 in a 256-bit one.

A weight of which nothing is dropped (a dense head on the CPU) has each block's codes of all
channels together instead, see ``by_block``: so memory is read from one end to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from wina.errors import UsageError
from wina.kernels import backends, reference
from wina.kernels.cpu.library import Arena
from wina.kernels.packing import only, unpack_biases

BLOCK_BYTES = 64
BITS = (8, 4)
SCHEMAS = {
    # A weight is three tensors: codes, scales, and zeros or an empty one. Lists are flat.
    "quantized_linear": "(Tensor x, Tensor[] weight, Tensor thresholds, Tensor[] bias) -> Tensor",
    "quantized_linears": (
        "(Tensor x, Tensor[] norm, float epsilon, Tensor[] weights, Tensor[] thresholds, "
        "Tensor[] biases, Tensor[] residual) -> Tensor[]"
    ),
    "quantized_gated_mlp": (
        "(Tensor x, Tensor[] norm, float epsilon, Tensor[] weights, Tensor[] thresholds, "
        "str activation, Tensor[] biases, Tensor[] residual) -> Tensor"
    ),
}


class QuantizedWeight(NamedTuple):
    """A linear's weight in the layout above.

    Attributes:
        codes: (in_features, bytes of a row), int8 for 8 bits and uint8 for 4; or (blocks,
            in_features, 64).
        scales: (groups, out_features), float32, float16 or bfloat16.
        zeros: (groups, out_features), int8: zero points; of the scales' dtype: minima; or empty.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.scales.shape[1], self.codes.shape[-2]

    @property
    def group_size(self) -> int:
        """Input channels that share a scale."""
        return self.codes.shape[-2] // max(1, self.scales.shape[0])

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes, the padding of rows to whole blocks included."""
        return self.codes.numel()

    @property
    def scale_bytes(self) -> int:
        """Bytes of all scales and zeros."""
        return sum(x.numel() * x.element_size() for x in (self.scales, self.zeros))


def pack(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bits: int = 4,
    arena: Arena | None = None,
) -> QuantizedWeight:
    """Lay out a quantized weight for the kernels.

    Args:
        codes: q, (out_features, in_features), integers of -8 to 7, or -128 to 127 for 8 bits.
        scales: (out_features, groups), float32, float16 or bfloat16; groups divides in_features.
        zeros: (out_features, groups): int8 zero points, or, with 4 bits, minima in the scales'
            dtype.
        bits: 8 or 4.
        arena: where codes on the CPU are put; None gives them memory of their own.

    Raises:
        UsageError: shapes, dtypes or codes that the layout cannot hold.
    """
    out, width = codes.shape
    if bits not in BITS:
        raise UsageError(f"codes of {bits} bits; the kernels have 4 and 8")
    if scales.ndim != 2 or scales.shape[0] != out or not scales.shape[1] or width % scales.shape[1]:
        raise UsageError(
            f"scales of shape {tuple(scales.shape)} do not divide a weight of {tuple(codes.shape)} "
            "into groups of one size"
        )
    if scales.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"scales of {scales.dtype}; the kernels have float32, float16, bfloat16")
    if zeros is not None and (
        zeros.shape != scales.shape or zeros.dtype not in (torch.int8, scales.dtype)
    ):
        raise UsageError("zeros must have the scales' shape, and be int8 or of the scales' dtype")
    if bits == 8 and zeros is not None and zeros.is_floating_point():
        raise UsageError("codes of 8 bits have zero points, not minima")
    bound = 1 << (bits - 1)
    if codes.numel() and (int(codes.min()) < -bound or int(codes.max()) >= bound):
        raise UsageError(f"codes outside {-bound} to {bound - 1}")
    columns = BLOCK_BYTES * 8 // bits
    blocks = -(-out // columns)
    rows = functional.pad(codes.to(torch.int8).t(), (0, blocks * columns - out))
    # (i, h, l, k) of the outputs -> (l, h, k, i) of the words
    words = rows.reshape(width, blocks, -1, 2, 4, 4).permute(0, 1, 4, 3, 5, 2)
    if bits == 8:
        ordered = words.reshape(width, -1)
    else:
        nibbles = (words + 8).to(torch.uint8).reshape(width, -1, 2)
        ordered = nibbles[..., 0] | nibbles[..., 1] << 4
    if ordered.device.type == "cpu":
        # Rows a power of two apart would compete for a few sets of the caches.
        row = ordered.shape[1]
        apart = row + (BLOCK_BYTES if row % 1024 == 0 else 0)
        room = (arena or Arena(chunk=0)).empty((width, apart), ordered.dtype)
        stored = room[:, :row].copy_(ordered)
    else:
        stored = ordered.contiguous()
    none = scales.new_empty(0) if zeros is None else zeros.t().contiguous()
    return QuantizedWeight(stored, scales.t().contiguous(), none)


def by_block(weight: QuantizedWeight, arena: Arena | None = None) -> QuantizedWeight:
    """Return a weight whose codes lie block by block: the kernels of the CPU alone read it.

    Args:
        weight: as ``pack`` lays it out, on the CPU.
        arena: where the codes are put; None gives them memory of their own.
    """
    blocks = weight.codes.reshape(weight.shape[1], -1, BLOCK_BYTES).transpose(0, 1)
    room = (arena or Arena(chunk=0)).empty(blocks.shape, blocks.dtype)
    return weight._replace(codes=room.copy_(blocks))


def unpack(weight: QuantizedWeight) -> Tensor:
    """Return the codes, shape (out_features, in_features), int8."""
    codes, out, width = weight.codes, *weight.shape
    if codes.ndim == 3:
        codes = codes.transpose(0, 1).flatten(1)
    if weight.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).to(torch.int8) - 8
    words = codes.reshape(width, -1, 4, 2, 4, 16 // weight.bits)
    return words.permute(0, 1, 5, 3, 2, 4).reshape(width, -1)[:, :out].t()


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Return W, shape (out_features, in_features), float32."""
    scales, zeros = weight.scales.t().float()[..., None], weight.zeros.t()[..., None]
    grouped = unpack(weight).float().reshape(*scales.shape[:2], -1)
    if not weight.zeros.numel():
        return (grouped * scales).flatten(1)
    if zeros.is_floating_point():
        return ((grouped + 8) * scales + zeros.float()).flatten(1)
    return ((grouped - zeros.float()) * scales).flatten(1)


# --- the oracle ---


def _matrix(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return dequantize(weight).to(dtype)


def reference_linear(
    x: Tensor, weight: QuantizedWeight, thresholds: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return W drop(x) + b with W in x's dtype; terms as in wina.kernels.reference."""
    return reference.sparse_linear(x, _matrix(weight, x.dtype), thresholds, bias)


def _linear(x: Tensor, weight: list[Tensor], thresholds: Tensor, bias: list[Tensor]) -> Tensor:
    return reference_linear(x, QuantizedWeight(*weight), thresholds, *bias)


def _linears(
    x: Tensor,
    norm: list[Tensor],
    epsilon: float,
    weights: list[Tensor],
    thresholds: list[Tensor],
    biases: list[Tensor],
    residual: list[Tensor],
) -> list[Tensor]:
    matrices = [_matrix(weight, x.dtype) for weight in weights_of(weights)]
    arguments = (matrices, thresholds, unpack_biases(biases, len(matrices)), only(residual))
    return reference.fused_linears(x, only(norm), epsilon, *arguments)


def _gated_mlp(
    x: Tensor,
    norm: list[Tensor],
    epsilon: float,
    weights: list[Tensor],
    thresholds: list[Tensor],
    activation: str,
    biases: list[Tensor],
    residual: list[Tensor],
) -> Tensor:
    matrices = [_matrix(weight, x.dtype) for weight in weights_of(weights)]
    arguments = (matrices, thresholds, activation, unpack_biases(biases, 3), only(residual))
    return reference.fused_gated_mlp(x, only(norm), epsilon, *arguments)


def weights_of(tensors: Sequence[Tensor]) -> list[QuantizedWeight]:
    """Return the weights of an operator's flat list, three tensors each."""
    return [QuantizedWeight(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]


# --- the operators ---


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, thresholds: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return W drop(x) + b, shape (..., out_features), in x's dtype.

    Args:
        x: (..., in_features), float32, float16 or bfloat16 for the compiled kernels. They round x
            to 16 bits of the largest in each few channels (float32: to 31), a rounding below that
            of the result; what is not finite makes the whole row NaN.
        weight: as ``pack`` lays it out.
        thresholds: (in_features,), float32.
        bias: (out_features,), x's dtype.
    """
    grad = torch.is_grad_enabled() and x.requires_grad
    if grad or backends.active_backend() == backends.REFERENCE or x.dtype == torch.float64:
        return reference_linear(x, weight, thresholds, bias)
    biases = [] if bias is None else [bias]
    result: Tensor = torch.ops.wina.quantized_linear(x, list(weight), thresholds, biases)
    return result


def _fake_linear(x: Tensor, weight: list[Tensor], *rest: object) -> Tensor:
    del rest
    return x.new_empty((*x.shape[:-1], weight[1].shape[1]))


def _fake_linears(
    x: Tensor, norm: list[Tensor], epsilon: float, weights: list[Tensor], *rest: object
) -> list[Tensor]:
    del norm, epsilon, rest
    return [x.new_empty((*x.shape[:-1], scales.shape[1])) for scales in weights[1::3]]


def _fake_gated_mlp(
    x: Tensor, norm: list[Tensor], epsilon: float, weights: list[Tensor], *rest: object
) -> Tensor:
    del norm, epsilon, rest
    return x.new_empty((*x.shape[:-1], weights[7].shape[1]))


def define() -> None:
    """Define the operators, with the oracle as the implementation that serves any device."""
    implementations: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
        "quantized_linear": (_linear, _fake_linear),
        "quantized_linears": (_linears, _fake_linears),
        "quantized_gated_mlp": (_gated_mlp, _fake_gated_mlp),
    }
    for name, (implementation, fake) in implementations.items():
        op = f"wina::{name}"
        torch.library.define(op, SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(op, "CompositeExplicitAutograd", implementation)
        torch.library.register_fake(op, fake)
