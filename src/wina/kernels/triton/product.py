"""y = W drop(x) for some rows of x at once: one product on tensor cores, x masked on its way.

With several rows whose masks differ hardly a row of W is left out, so W is read whole, once. What
is saved is the rest: up to three projections of one x, each with its own thresholds, are one
launch, and no masked copy of x is written. Programs that share a tile split the channels; the one
that comes last, by an integer ticket, adds up their float32 sums in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from wina.kernels.measured import Measured
from wina.kernels.shapes import tiles_of
from wina.kernels.tickets import tickets
from wina.kernels.triton import TILES

MOST = 3  # projections of one launch
ROWS = TILES[-1]  # of x; for more dense products on masked copies are faster
UNITS = 8  # multiprocessors of Triton's interpreter
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Cut:
    """How a product is cut up.

    Attributes:
        columns: outputs of a program.
        channels: read at a time.
        split: programs that share a tile.
        stages: of channels under way.
        warps: of a program.
        turned: outputs stand in the place of rows, of which Hopper's instruction for whole groups
            of warps takes 64 at least, and rows in the place of outputs, of which it takes 8.
    """

    columns: int = 64
    channels: int = 128
    split: int = 1
    stages: int = 3
    warps: int = 4
    turned: bool = False


TABLE = Measured(Path(__file__).with_name("cuts.json"), Cut)


# Addresses are numbers here, so that one of three can be chosen; 0 where there is none.
@triton.jit
def _pick(tile, first, second, a, b, c):
    return tl.where(tile < first, a, tl.where(tile < second, b, c))


@triton.jit
def _pointer(tile, first, second, a, b, c, ELEMENT: tl.constexpr):
    # Of 64 bits even where all three are 0, which would be an integer of 32. Aligned is said here:
    # of what a call gives the compiler does not learn it, and would load element by element.
    found = _pick(tile, first, second, a, b, c).to(tl.int64).to(tl.pointer_type(ELEMENT))
    return tl.multiple_of(found, 16)


@triton.jit(
    do_not_specialize=[
        "weight0", "weight1", "weight2", "limits0", "limits1", "limits2", "bias0", "bias1", "bias2",
        "extra0", "extra1", "extra2", "out0", "out1", "out2", "first", "second", "rows",
    ]
)  # fmt: skip
def _product(
    x, flags, sums, tickets,
    weight0, weight1, weight2, limits0, limits1, limits2, bias0, bias1, bias2,
    extra0, extra1, extra2, out0, out1, out2,
    stride0, stride1, stride2, pitch0, pitch1, pitch2, outputs0, outputs1, outputs2,
    first, second, rows, inputs,
    ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    SPLIT: tl.constexpr, SHARE: tl.constexpr, FLAGGED: tl.constexpr, EVEN: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0)
    part = tl.program_id(1)
    begin = _pick(which, first, second, 0, first, second)
    weight = _pointer(which, first, second, weight0, weight1, weight2, ELEMENT)
    limits = _pointer(which, first, second, limits0, limits1, limits2, tl.float32)
    stride = _pick(which, first, second, stride0, stride1, stride2)
    outputs = _pick(which, first, second, outputs0, outputs1, outputs2)
    stride = tl.multiple_of(stride, 8)
    columns = (which - begin) * COLUMNS + tl.arange(0, COLUMNS)
    places = tl.arange(0, ROWS)
    # Rows run down and outputs across a tile; turned, the other way round.
    row = places[None, :] if TURNED else places[:, None]
    column = columns[:, None] if TURNED else columns[None, :]
    inside = row < rows
    wanted = column < outputs
    if FLAGGED:
        flagged = tl.load(flags + row, inside, 0) != 0
    total = tl.zeros((COLUMNS, ROWS) if TURNED else (ROWS, COLUMNS), tl.float32)
    channels = part * SHARE + tl.arange(0, CHANNELS)
    for step in range(0, SHARE, CHANNELS):
        now = channels + step
        across = now[None, :] if TURNED else now[:, None]  # of the weight's tile
        along = now[:, None] if TURNED else now[None, :]  # of x's
        cells = weight + across.to(tl.int64) * stride + column
        if EVEN:
            found = tl.load(cells, eviction_policy="evict_first")
            t = tl.load(limits + along)
            values = tl.load(x + row * inputs + along, inside, 0.0)
        else:
            there = (across < inputs) & wanted
            found = tl.load(cells, there, 0.0, eviction_policy="evict_first")
            t = tl.load(limits + along, along < inputs, 0.0)
            values = tl.load(x + row * inputs + along, inside & (along < inputs), 0.0)
        dropped = tl.abs(values.to(tl.float32)) < t  # so that NaN is kept
        if FLAGGED:
            dropped = dropped & flagged
        kept = tl.where(dropped, 0.0, values).to(ELEMENT)
        total = tl.dot(found, kept, total) if TURNED else tl.dot(kept, found, total)
    last = True
    if SPLIT > 1:
        cell = row * COLUMNS + column - (which - begin) * COLUMNS
        mine = sums + (which * SPLIT).to(tl.int64) * (ROWS * COLUMNS) + cell
        tl.store(mine + part * (ROWS * COLUMNS), total)
        tl.debug_barrier()  # all threads have stored when one of them takes the ticket
        last = tl.atomic_add(tickets + which, 1, sem="acq_rel") == SPLIT - 1
        if last:
            tl.store(tickets + which, 0)
            total = tl.zeros_like(total)
            for other in range(SPLIT):
                total += tl.load(mine + other * (ROWS * COLUMNS), cache_modifier=".cg")
    if last:
        out = _pointer(which, first, second, out0, out1, out2, ELEMENT)
        pitch = _pick(which, first, second, pitch0, pitch1, pitch2)
        pitch = tl.multiple_of(pitch, 8)
        bias = _pick(which, first, second, bias0, bias1, bias2)
        if bias != 0:
            added = tl.load(bias.to(tl.int64).to(tl.pointer_type(ELEMENT)) + column, wanted, 0.0)
            total += added.to(tl.float32)
        extra = _pick(which, first, second, extra0, extra1, extra2)
        if extra != 0:
            added = tl.load(extra.to(tl.int64).to(tl.pointer_type(ELEMENT)) + column, wanted, 0.0)
            added = added.to(tl.float32)
            if FLAGGED:
                added = tl.where(flagged, added, 0.0)
            total += added
        where = row.to(tl.int64) * pitch + column
        tl.store(out + where, total.to(ELEMENT), inside & wanted)


def serves(x: Tensor, weights: Sequence[Tensor], thresholds: Sequence[Tensor]) -> bool:
    """Return whether ``masked_product`` computes this, and fast: 16 bits, input-major, aligned.

    Args:
        x: shape (..., inputs).
        weights: W of each projection, shape (outputs, inputs).
        thresholds: shape (inputs,), one of each projection.
    """
    inputs = x.shape[-1]
    return (
        x.dtype in DTYPES
        and 0 < x.numel() <= ROWS * inputs
        and len(weights) <= MOST
        and inputs % 8 == 0
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in thresholds)
        and all(
            w.dtype == x.dtype
            and w.stride(0) == 1
            and w.stride(1) % 8 == 0
            and w.shape[0] % 8 == 0
            and w.data_ptr() % 16 == 0
            for w in weights
        )
        and _cut(x, weights) is not None
    )


def masked_product(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    flags: Tensor | None = None,
    sparse_biases: Sequence[Tensor | None] = (),
    out: Tensor | None = None,
    cut: Cut | None = None,
) -> list[Tensor]:
    """Return W drop(x) + b of each projection; ``serves`` must hold.

    Args:
        x: shape (..., inputs).
        weights: one to three, input-major.
        thresholds: shape (inputs,), float32, one of each projection.
        biases: shape (outputs,) or None, one of each projection.
        flags: False for rows that nothing is dropped of, shape (rows,), bool; None: all are sparse.
        sparse_biases: as ``biases``, added to the rows that flags names.
        out: holds the results then, side by side, shape (rows, all outputs).
        cut: how the work is cut up; chosen if omitted.

    Raises:
        ValueError: there are more than ``ROWS`` rows, or no cut is given nor known.
    """
    shape, inputs = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, inputs).contiguous()
    rows = len(x)
    if rows > ROWS:
        raise ValueError(f"{rows} rows; the product takes {ROWS}")
    tile = _tile(rows)
    sizes = [w.shape[0] for w in weights]
    cut = cut or _cut(x, weights)
    if cut is None:
        raise ValueError(f"no cut is known for {rows} rows of {inputs} channels")
    if out is None:
        results = [x.new_empty((*shape, size)) for size in sizes]
        held = [one.view(rows, -1) for one in results]
    else:
        results = held = list(torch.split(out, sizes, -1))
    share = triton.cdiv(triton.cdiv(inputs, cut.split), cut.channels) * cut.channels
    split = triton.cdiv(inputs, share)
    tiles = tiles_of(sizes, cut.columns)
    total = sum(tiles)
    sums = x.new_empty(total * split * tile * cut.columns if split > 1 else 1, dtype=torch.float32)
    even = inputs == share * split and all(size % cut.columns == 0 for size in sizes)
    _product[(total, split)](
        x, x if flags is None else flags.view(torch.uint8), sums,
        tickets(x.device, weights[0].data_ptr(), total if split > 1 else 1),
        *_addresses(weights), *_addresses(thresholds), *_addresses(biases),
        *_addresses(sparse_biases or [None]), *_addresses(held),
        *_three([w.stride(1) for w in weights]), *_three([one.stride(0) for one in held]),
        *_three(sizes), tiles[0], sum(tiles[:2]), rows, inputs,
        ELEMENT=DTYPES[x.dtype], ROWS=tile, COLUMNS=cut.columns, CHANNELS=cut.channels,
        SPLIT=split, SHARE=share, FLAGGED=flags is not None, EVEN=even,
        TURNED=cut.turned,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return results


def _tile(rows: int) -> int:
    return next(tile for tile in TILES if tile >= rows)


def _cut(x: Tensor, weights: Sequence[Tensor]) -> Cut | None:
    outputs = tuple(w.shape[0] for w in weights)
    tile = _tile(x.numel() // x.shape[-1])
    return TABLE.once((tile, x.shape[-1], outputs, x.device), _cut_on)


def _cut_on(tile: int, inputs: int, outputs: tuple[int, ...], device: torch.device) -> Cut | None:
    if device.type != "cuda":
        return rule(tile, inputs, outputs, UNITS)
    usual = partial(rule, tile, inputs, outputs)
    return TABLE.best(device.index or 0, cut_key(tile, inputs, outputs), usual)


def cut_key(tile: int, inputs: int, outputs: Sequence[int]) -> str:
    """Return the name of a product in the table of cuts."""
    return f"{tile} {inputs}->{'+'.join(map(str, outputs))}"


def rule(tile: int, inputs: int, outputs: Sequence[int], units: int) -> Cut | None:
    """Return how to cut a product that was not measured; None where masked copies serve.

    It is what the measured cuts of Llama-3-8B's shapes have in common.

    Args:
        tile: rows of a program.
        inputs: channels.
        outputs: of each projection.
        units: multiprocessors.
    """
    wide = 2 * sum(tiles_of(outputs, 128)) >= 3 * units
    if tile > 32 and len(outputs) == 1:
        return None  # many rows keep the tensor cores busy, and masking delays them
    if wide:
        return Cut(128, 64, stages=4, turned=tile == 32)
    cut, programs = {
        16: (Cut(64, 128, stages=4), units),
        32: (Cut(64, 128, stages=4, turned=True), 2 * units),
        64: (Cut(64, 32, stages=6), 3 * units),
    }[tile]
    split = max(1, round(programs / sum(tiles_of(outputs, cut.columns))))
    return replace(cut, split=min(split, 8, max(1, inputs // (2 * cut.channels))))


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return _three([0 if one is None else one.data_ptr() for one in tensors])


def _three(numbers: Sequence[int]) -> list[int]:
    return [*numbers, *[numbers[0]] * (MOST - len(numbers))]  # what is added is never picked
