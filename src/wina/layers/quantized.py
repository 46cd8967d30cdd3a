"""Read the weights of linears that other libraries quantized, and lay them out for the kernels.

No library is named and none is imported. What is asked of a linear is its scales (a tensor with one
number for each output and group of inputs) and the matrix that its own forward multiplies with.
Divided by the scales that matrix must be integers of 8 or 4 bits around one zero point a group; if
it is, to the rounding of its dtype, the integers are the codes, whatever the library packed them
into. Otherwise (floating-point codes, groups of permuted inputs, no scales) the linear stays with
the library and is masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from wina.kernels import QuantizedWeight, pack, quantized_linear
from wina.kernels.cpu import Arena
from wina.layers.foreign import (
    FLOATS,
    dequantized,
    device_of,
    dtype_of,
    forward_of,
    plain_weight,
    shape_of,
)

SCALES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256  # levels of a group
LARGE = 128.0  # beside values of 1; of W x + b in bfloat16, 16-bit rounding is 1 % there
CLOSE, CLOSE_BESIDE = 0.008, 0.1
FEW = 8  # rows that the kernel computes; the library's own forward takes more
BUFFERS = ("packed_codes", "packed_scales", "packed_zeros")
NO_THRESHOLDS = "no_thresholds"


@torch.no_grad()
def read(module: nn.Module, arena: Arena | None = None) -> QuantizedWeight | None:
    """Return a foreign linear's weight as codes and scales; None if it is not made of those.

    None too where the linear rounds its inputs: the kernels do not, and would compute otherwise.
    """
    candidates = [x for x in _tensors(module) if _scales(x, module) is not None]
    if not candidates:
        return None
    matrix = dequantized(module)
    for tensor in candidates:
        scales = _scales(tensor, module)
        assert scales is not None
        found = _codes(matrix, scales)
        if found is not None and _keeps_inputs(module, matrix):
            codes, zeros, bits = found
            return pack(codes, scales, zeros, bits, arena)
    return None


def packed(module: nn.Module) -> QuantizedWeight | None:
    """Return the weight that ``store`` laid out; None if there is none."""
    codes, scales, zeros = (module._buffers.get(name) for name in BUFFERS)
    if codes is None or scales is None or zeros is None:
        return None
    return QuantizedWeight(codes, scales, zeros)


class Stored(NamedTuple):
    """What a quantized weight takes in the kernels' layout: bytes, and groups of inputs."""

    code_bytes: int
    scale_bytes: int
    groups: int

    def bytes_read(self, dropped: float = 0.0, idle: float = 0.0) -> float:
        """Return the bytes that a token reads.

        Args:
            dropped: share of channels that are dropped.
            idle: share of groups without a kept channel, whose scales are not read either.
        """
        return self.code_bytes * (1 - dropped) + self.scale_bytes * (1 - idle)


_STORED: WeakKeyDictionary[nn.Module, Stored | None] = WeakKeyDictionary()


def stored(module: nn.Module) -> Stored | None:
    """Return what a linear's weight takes; None if it is not made of codes and scales.

    A linear that is not laid out is read once.
    """
    laid_out = packed(module)
    if laid_out is not None:
        return _size(laid_out)
    if module not in _STORED:
        linear = isinstance(getattr(module, "out_features", None), int)
        weight = read(module) if linear and plain_weight(module) is None else None
        _STORED[module] = None if weight is None else _size(weight)
    return _STORED[module]


def _size(weight: QuantizedWeight) -> Stored:
    return Stored(weight.code_bytes, weight.scale_bytes, len(weight.scales))


def store(module: nn.Module, weight: QuantizedWeight) -> None:
    """Keep a weight laid out for the kernels beside the module's own, which prompts go through."""
    for name, tensor in zip(BUFFERS, weight, strict=True):
        module.register_buffer(name, tensor, persistent=False)


def store_dense(module: nn.Module, weight: QuantizedWeight) -> None:
    """As ``store``, for a linear that stays dense (the head), with thresholds that drop nothing."""
    store(module, weight)
    zeros = torch.zeros(weight.shape[1], device=weight.codes.device)
    module.register_buffer(NO_THRESHOLDS, zeros, persistent=False)


def drop(module: nn.Module) -> None:
    """Undo ``store``."""
    for name in (*BUFFERS, NO_THRESHOLDS):
        if name in module._buffers:
            delattr(module, name)


def multiply(module: nn.Module, x: Tensor, vector: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return W drop(x) + b by the kernels; None if ``store`` laid nothing out, or for many rows."""
    weight = packed(module) if is_few(x) else None
    if weight is None:
        return None
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return quantized_linear(x, weight, vector, bias)


def is_few(x: Tensor) -> bool:
    """Return whether the kernel is the faster way for so many rows."""
    return x.dtype in SCALES and x.numel() <= FEW * x.shape[-1]


def _keeps_inputs(module: nn.Module, matrix: Tensor) -> bool:
    """Return whether a linear multiplies with its inputs, not with those rounded to some bits.

    Rounding shows in a random input, or, where the step is set by the largest, beside a large one.
    """
    device, dtype = device_of(module), dtype_of(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, matrix.shape[1], generator=generator).to(device, dtype)
    large = torch.zeros_like(x[:1])
    large[0, 0] = LARGE
    forward, wanted = forward_of(module), x.float() @ matrix.float().t()
    zero = forward(torch.zeros_like(large)).float()
    alone = forward(x).float() - zero
    beside = forward(x + large).float() - forward(large).float()
    size = wanted.norm().clamp(min=1e-30)
    plain, shifted = (float((found - wanted).norm() / size) for found in (alone, beside))
    return plain < CLOSE and shifted < CLOSE_BESIDE


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's tensors, and those that its tensors are made of."""
    own = [*module._parameters.values(), *module._buffers.values()]
    for tensor in own:
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None:
            yield from (getattr(tensor, name) for name in flatten()[0])
        elif tensor is not None:
            yield tensor


def _scales(tensor: Tensor, module: nn.Module) -> Tensor | None:
    """Return a tensor as scales, shape (out_features, groups), if its shape is one of theirs."""
    out, width = shape_of(module)
    if tensor.dtype not in SCALES or tensor.is_meta or tensor.numel() % max(out, 1):
        return None
    groups = tensor.numel() // max(out, 1)
    if not 0 < groups < width or width % groups:
        return None  # as many as inputs: a matrix of weights
    if tensor.shape in ((out,), (out, groups)):
        return tensor.detach().reshape(out, groups)
    return tensor.detach().t() if tensor.shape == (groups, out) else None


def _codes(matrix: Tensor, scales: Tensor) -> tuple[Tensor, Tensor | None, int] | None:
    """Return codes, zero points and bits: scales (codes - zeros) is the matrix; or None."""
    out, groups = scales.shape
    dtype = matrix.dtype if matrix.dtype in FLOATS else torch.float32
    grouped = matrix.float().reshape(out, groups, -1)
    by = scales.float()[..., None]
    levels = torch.where(by == 0, 0, grouped / by).round()
    low, high = levels.amin(-1), levels.amax(-1)
    epsilon = max(torch.finfo(x).eps for x in (dtype, scales.dtype, torch.float32))
    if not bool(torch.isfinite(levels).all()) or float(levels.abs().max()) * epsilon > 1:
        return None  # a level cannot be told from its neighbours
    wrong = (levels * by - grouped).abs() > 2 * epsilon * grouped.abs() + 1e-30
    if bool(wrong.any()):
        return None
    span = int((high - low).max()) + 1
    for bits in (4, 8):
        bound = 1 << (bits - 1)
        if float(low.min()) >= -bound and float(high.max()) < bound:
            return levels.reshape(out, -1).to(torch.int8), None, bits
        zeros = -bound - low
        if span <= 2 * bound <= WIDEST and float(zeros.min()) >= -128 and float(zeros.max()) <= 127:
            codes = levels + zeros[..., None]
            return codes.reshape(out, -1).to(torch.int8), zeros.to(torch.int8), bits
    return None
