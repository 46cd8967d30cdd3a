"""y = W drop(x) by skipping rows of an input-major W, in Triton.

The programs of one tile of outputs share the channels; a load whose channel every token drops is
masked out, and costs no memory traffic. Their sums go to a small float32 buffer and are added up
in a fixed order by a second kernel, so results don't vary between runs. (Deja Vu and TEAL add
with atomics: arXiv 2310.17157, 2408.14690.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 128
CHANNELS = 32
UNITS = 264  # programs that fill a large GPU


@triton.jit
def _rows(
    x, weight, thresholds, sums, inputs, outputs, stride,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * SHARE
    tokens = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for step in range(0, SHARE, CHANNELS):
        channels = first + step + tl.arange(0, CHANNELS)
        inside = channels < inputs
        limits = tl.load(thresholds + channels, inside, other=0.0)
        values = tl.load(x + tokens[:, None] * inputs + channels[None, :], inside[None, :], 0.0)
        values = values.to(tl.float32)
        live = inside[None, :] & ~(tl.abs(values) < limits[None, :])  # so that NaN is kept
        values = tl.where(live, values, 0.0)
        any_live = tl.max(live.to(tl.int32), axis=0) > 0
        place = weight + channels.to(tl.int64)[:, None] * stride + columns[None, :]
        found = tl.load(place, any_live[:, None] & (columns < outputs)[None, :], 0.0)
        product = values[:, :, None] * found.to(tl.float32)[None, :, :]
        total += tl.sum(product, axis=1)
    place = sums + (tl.program_id(1) * TOKENS + tokens[:, None]) * outputs + columns[None, :]
    tl.store(place, total, (columns < outputs)[None, :])


@triton.jit
def _finish(
    sums, bias, out, outputs, size,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(sums + split * TOKENS * outputs + places, inside, 0.0)
    if BIASED:
        total += tl.load(bias + places % outputs, inside, 0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), inside)


def rows(x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
    """Return W drop(x) + b; shapes as in wina.kernels.reference.

    Args:
        x: a few tokens, at least one; float32, float16 or bfloat16.
        weight: input-major, strides (1, stride).
        thresholds: shape (in_features,).
        bias: shape (out_features,) or None.
    """
    outputs, inputs = weight.shape
    flat = x.reshape(-1, inputs)
    tokens = triton.next_power_of_2(len(flat))
    if tokens > len(flat):
        flat = torch.cat((flat, flat.new_zeros(tokens - len(flat), inputs)))
    flat = flat.contiguous()
    columns = min(COLUMNS, triton.next_power_of_2(outputs))
    channels = max(4, CHANNELS // tokens)
    tiles = triton.cdiv(outputs, columns)
    splits = max(1, min(UNITS // tiles, triton.cdiv(inputs, channels)))
    share = triton.cdiv(triton.cdiv(inputs, splits), channels) * channels
    splits = triton.cdiv(inputs, share)
    sums = torch.empty(splits, tokens, outputs, device=x.device, dtype=torch.float32)
    out = x.new_empty((*x.shape[:-1], outputs))
    _rows[(tiles, splits)](
        flat, weight, thresholds.contiguous(), sums, inputs, outputs, weight.stride(1),
        TOKENS=tokens, COLUMNS=columns, CHANNELS=channels, SHARE=share,
    )  # fmt: skip
    block = 256
    _finish[(triton.cdiv(out.numel(), block),)](
        sums, bias if bias is not None else out, out, outputs, out.numel(),
        TOKENS=tokens, SPLITS=splits, BIASED=bias is not None, BLOCK=block,
    )  # fmt: skip
    return out
