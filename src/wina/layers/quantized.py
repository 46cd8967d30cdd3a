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

import torch
from torch import Tensor, nn

from wina.kernels import QuantizedWeight, pack
from wina.layers.foreign import FLOATS, dequantized, shape_of

SCALES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256  # levels of a group
FEW = 8  # rows that the kernel computes; the library's own forward takes more
BUFFERS = ("packed_codes", "packed_scales", "packed_zeros")


@torch.no_grad()
def read(module: nn.Module) -> QuantizedWeight | None:
    """Return a foreign linear's weight as codes and scales; None if it is not made of those."""
    candidates = [x for x in _tensors(module) if _scales(x, module) is not None]
    if not candidates:
        return None
    matrix = dequantized(module)
    for tensor in candidates:
        scales = _scales(tensor, module)
        assert scales is not None
        found = _codes(matrix, scales)
        if found is not None:
            codes, zeros, bits = found
            return pack(codes, scales, zeros, bits)
    return None


def packed(module: nn.Module) -> QuantizedWeight | None:
    """Return the weight that ``store`` laid out; None if there is none."""
    if module._buffers.get(BUFFERS[0]) is None:
        return None
    return QuantizedWeight(*(module.get_buffer(name) for name in BUFFERS))


def store(module: nn.Module, weight: QuantizedWeight) -> None:
    """Keep a weight laid out for the kernels beside the library's own, which prompts go through."""
    for name, tensor in zip(BUFFERS, weight, strict=True):
        module.register_buffer(name, tensor, persistent=False)


def drop(module: nn.Module) -> None:
    """Undo ``store``."""
    for name in BUFFERS:
        if name in module._buffers:
            delattr(module, name)


def is_few(x: Tensor) -> bool:
    """Return whether the kernel is the faster way for so many rows."""
    return x.dtype in SCALES and x.numel() <= FEW * x.shape[-1]


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
