"""On one input every kernel keeps the very channels that the reference keeps, at the edge too.

With the identity as the weight an output is the channel itself, or 0 where it was dropped; so what
a kernel listed can be read off its result, to the bit. Texts of two backends may still part: their
inputs differ by rounding, and a channel next to its threshold falls on either side (docs/bench.md).
"""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_sparse_linear import DTYPES, INSTRUCTION_SETS, compiled, input_major
from torch import Tensor

from wina.kernels import (
    pack,
    quantized_linear,
    reference,
    sparse_gated_mlp,
    sparse_linear,
    sparse_linears,
)
from wina.kernels.cpu import use_instruction_set

WIDTHS = (1, 15, 16, 33, 300)


def at_the_edge(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of which most lie at their threshold, or a rounding above or below it."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(rows, width, generator=generator) + 0.5).to(dtype)
    x *= torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1, 1).to(dtype)
    x[:, ::7] = 0
    thresholds = x[0].float().abs()
    above = torch.nextafter(thresholds, torch.full_like(thresholds, 9.0))
    below = torch.nextafter(thresholds, torch.zeros_like(thresholds))
    kind = torch.randint(4, (width,), generator=generator)
    thresholds = torch.where(kind == 1, above, torch.where(kind == 2, below, thresholds))
    # The other rows: the values of dtype next to row 0's.
    if rows > 1:
        moved = torch.nextafter(x[:1], torch.full_like(x[:1], 9.0)).expand(rows - 1, -1)
        change = (torch.rand(moved.shape, generator=generator) < 0.5) & (x[:1] != 0)
        x[1:] = torch.where(change, moved, x[:1])
    return x, thresholds.contiguous()


def identity(width: int, dtype: torch.dtype) -> Tensor:
    return input_major(torch.eye(width, dtype=dtype))


@compiled
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 40])
def test_the_masks_are_the_references(name: str, dtype: torch.dtype, rows: int) -> None:
    for width in WIDTHS:
        x, thresholds = at_the_edge(rows, width, dtype, seed=width)
        wanted = reference.drop(x, thresholds)
        with use_instruction_set(name):
            found = sparse_linear(x, identity(width, dtype), thresholds)
            both = sparse_linears(x, [identity(width, dtype)] * 2, [thresholds, thresholds / 2])
        assert torch.equal(found, wanted)
        assert torch.equal(both[0], wanted)
        assert torch.equal(both[1], reference.drop(x, thresholds / 2))
        kept = (x.float().abs() >= thresholds) & (x != 0)
        assert int((found != 0).sum()) == int(kept.sum())


@compiled
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_masks_inside_a_gated_mlp(name: str, dtype: torch.dtype, rows: int) -> None:
    width = 100
    x, thresholds = at_the_edge(rows, width, dtype)
    weights = [identity(width, dtype)] * 3
    hidden = torch.relu(reference.drop(x, thresholds)) * x
    last = hidden[0].float().abs()  # at its threshold, each of row 0
    last[::2] = torch.nextafter(last[::2], torch.full_like(last[::2], 9.0))
    vectors = [thresholds, torch.zeros(width), last]
    wanted = reference.drop(hidden, last)
    with use_instruction_set(name):
        assert torch.equal(sparse_gated_mlp(x, *weights, *vectors, activation="relu"), wanted)


@compiled
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_masks_of_quantized_weights(name: str, dtype: torch.dtype, bits: int) -> None:
    for width in (32, 96, 320):
        x, thresholds = at_the_edge(2, width, dtype, seed=width)
        weight = pack(torch.eye(width).to(torch.int8), torch.ones(width, width // 32), bits=bits)
        with use_instruction_set(name):
            found = quantized_linear(x, weight, thresholds)
        assert torch.equal(found != 0, reference.drop(x, thresholds) != 0)
