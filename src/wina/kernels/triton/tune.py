"""Measure how to cut up the masked product of a shape, beside a dense product on masked copies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wina.kernels.replay import REPLAYS, Replay, copies_of, level_of
from wina.kernels.shapes import Shape, tiles_of
from wina.kernels.triton import TILES
from wina.kernels.triton.gate import gate_rows
from wina.kernels.triton.product import TABLE, Cut, cut_key, masked_product, rule
from wina.progress import note

DEVICE = torch.device("cuda")
SPARSITY = 0.5  # what a product takes does not depend on it
COMPILERS = 12  # processes
CLOSE = 8  # of the best are measured again, longer
MOST_SHARED = 220 << 10  # bytes of a multiprocessor
ACCUMULATED = 128  # float32 sums of a thread, at most


def cuts(tile: int, shape: Shape, units: int) -> list[Cut]:
    """Return ways to cut a product up that fit a multiprocessor and fill a device.

    Args:
        tile: rows of x of a program.
        shape: of the product.
        units: multiprocessors.
    """
    found = []
    usual = rule(tile, shape.inputs, shape.projections, units)
    # Turned (see Cut) where rows alone do not fill Hopper's instruction, which 16 do not need.
    turns = {16: (False,), 32: (True,), 64: (True, False)}[tile]
    ways = itertools.product(turns, (64, 128, 256), (32, 64, 128), (3, 4, 6), (4, 8))
    for turned, columns, channels, stages, warps in ways:
        tiles = sum(tiles_of(shape.projections, columns))
        shared = stages * channels * 2 * (columns + tile)
        if shared > MOST_SHARED or tile * columns > ACCUMULATED * 32 * warps:
            continue
        least = 128 if turned else 64 * 128 // tile  # outputs that keep eight warps busy
        if (warps == 8 and columns < least) or (tile <= 32 and channels < 64):
            continue  # too little work for a thread; steps too short
        together = max(1, min(MOST_SHARED // shared, 16 // warps))  # programs of a multiprocessor
        for share in {1, together, max(1, together // 2)}:
            split = round(share * units / tiles)
            if not 1 <= split <= 16 or split * channels * 2 > shape.inputs:
                continue
            found.append(Cut(columns, channels, split, stages, warps, turned))
    return list(dict.fromkeys([*([usual] if usual else []), *found]))


class Trial:
    """A product's tensors on a device, and what is timed on them."""

    def __init__(
        self, shape: Shape, rows: int, dtype: torch.dtype, copies: int | None = None
    ) -> None:
        """Make as many sets of weights, enough to time it if omitted."""
        options: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
        inputs, outputs = shape.inputs, shape.projections
        self.copies = copies or copies_of(shape.weights * dtype.itemsize)
        self.x = torch.randn(rows, inputs, **options)
        self.weights = [
            torch.randn(inputs, sum(outputs), **options).mul_(inputs**-0.5).t()
            for _ in range(self.copies)
        ]
        self.sizes = list(outputs)
        self.thresholds = torch.full((len(outputs), inputs), level_of(SPARSITY), device=DEVICE)
        self.flags = torch.ones(rows, dtype=torch.bool, device=DEVICE)
        self.biases: list[Tensor | None] = [None] * len(outputs)

    def run(self, i: int, cut: Cut) -> list[Tensor]:
        """Return the product cut up so, with one of the sets of weights."""
        weights = torch.split(self.weights[i], self.sizes)
        vectors = list(self.thresholds)
        return masked_product(self.x, weights, vectors, self.biases, flags=self.flags, cut=cut)

    def masked(self, cut: Cut) -> Replay:
        """Capture the product cut up so."""
        return Replay(lambda i: self.run(i, cut), self.copies)

    def copied(self) -> Replay:
        """Capture what serves otherwise: a masked copy and a product of each projection."""

        def run(i: int) -> object:
            copies = gate_rows(self.x, self.thresholds, self.flags)
            weights = torch.split(self.weights[i], self.sizes)
            return [functional.linear(one, w) for one, w in zip(copies, weights, strict=True)]

        return Replay(run, self.copies)

    def dense(self) -> Replay:
        """Capture one dense product of all projections."""
        return Replay(lambda i: functional.linear(self.x, self.weights[i]), self.copies)


def tune(shape: Shape, tile: int, dtype: torch.dtype, compiled: Sequence[Cut]) -> Cut | None:
    """Return the fastest of the cuts, or None where masked copies are no slower.

    Args:
        shape: of the product.
        tile: rows of x, all sparse.
        dtype: float16 or bfloat16.
        compiled: the cuts to measure.
    """
    trial = Trial(shape, tile, dtype)
    times: dict[Cut, float] = {}
    for cut in compiled:
        times[cut] = trial.masked(cut).time(REPLAYS).p50
    for cut in sorted(times, key=lambda one: times[one])[:CLOSE]:
        times[cut] = trial.masked(cut).time(3 * REPLAYS).p50
    copied = trial.copied().time(3 * REPLAYS).p50
    dense = trial.dense().time(3 * REPLAYS).p50
    best = min(times, key=lambda one: times[one], default=None)
    took = times[best] if best is not None else float("inf")
    key = cut_key(tile, shape.inputs, shape.projections)
    note(f"{key}: {took:.1f} us, masked copies {copied:.1f}, dense {dense:.1f}; {best}")
    return best if took < copied else None


def extend(
    shapes: Iterable[Shape], tiles: Sequence[int], dtype: torch.dtype, *, again: bool = False
) -> Mapping[str, Cut | None]:
    """Tune what the tables lack; each result is kept at once, so an interrupted run goes on.

    Args:
        shapes: of the products.
        tiles: rows of x, each one of ``wina.kernels.triton.TILES``.
        dtype: float16 or bfloat16; they share what is found.
        again: tune what the tables have, too.

    Returns:
        By the product's name, also what the tables had; None where masked copies serve.
    """
    assert all(tile in TILES for tile in tiles)
    wanted = {
        cut_key(tile, shape.inputs, shape.projections): (shape, tile)
        for shape, tile in itertools.product(shapes, tiles)
    }
    return TABLE.extend(wanted, lambda missing: _tune_all(missing, dtype), again=again)


def _tune_all(missing: Sequence[tuple[Shape, int]], dtype: torch.dtype) -> Iterator[Cut | None]:
    """Yield the result of ``tune`` of each shape and tile, when all are compiled.

    Compilers run side by side, each with a device of its own; what they find is in Triton's cache.
    Only then is the device quiet, and measured on.
    """
    units = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    tried = [cuts(tile, shape, units) for shape, tile in missing]
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        ready = [
            [(cut, pool.submit(_compile, shape, tile, dtype, cut)) for cut in some]
            for (shape, tile), some in zip(missing, tried, strict=True)
        ]
        fitting = [[cut for cut, future in some if future.result()] for some in ready]
    for (shape, tile), some in zip(missing, fitting, strict=True):
        yield tune(shape, tile, dtype, some)


def _compile(shape: Shape, tile: int, dtype: torch.dtype, cut: Cut) -> bool:
    """Compile by running once; False if it does not fit the device."""
    from triton.runtime.errors import OutOfResources

    try:
        Trial(shape, tile, dtype, copies=1).run(0, cut)
    except OutOfResources:
        return False
    return True
