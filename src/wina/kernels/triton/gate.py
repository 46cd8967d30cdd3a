"""drop(x) under several vectors at once, on those rows alone that a vector of flags names."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _gate(
    x, thresholds, flags, out, size, inputs,
    BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    values = tl.load(x + places, inside, 0.0)
    flagged = tl.load(flags + places // inputs, inside, 0) != 0
    magnitudes = tl.abs(values.to(tl.float32))
    for which in range(COUNT):
        limits = tl.load(thresholds + which * inputs + places % inputs, inside, 0.0)
        dropped = flagged & (magnitudes < limits)  # so that NaN is kept
        tl.store(out + which * size + places, tl.where(dropped, 0.0, values), inside)


def gate_rows(x: Tensor, thresholds: Tensor, flags: Tensor) -> Tensor:
    """Return x masked by each vector on flagged rows, and as it is on the others.

    Args:
        x: shape (rows, inputs).
        thresholds: shape (vectors, inputs), float32.
        flags: shape (rows,), bool.

    Returns:
        Shape (vectors, rows, inputs), x's dtype.
    """
    x = x.contiguous()
    out = x.new_empty(len(thresholds), *x.shape)
    if x.numel():
        _gate[(triton.cdiv(x.numel(), BLOCK),)](
            x, thresholds.contiguous(), flags.view(torch.uint8), out, x.numel(), x.shape[-1],
            BLOCK=BLOCK, COUNT=len(thresholds),
        )  # fmt: skip
    return out
