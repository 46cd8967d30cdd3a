"""Measure how to cut up the masked product of a shape, beside a dense product on masked copies."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wina.kernels.measured import device_kind
from wina.kernels.replay import REPLAYS, Replay, copies_of, level_of
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


@dataclass(frozen=True)
class Product:
    """A product: features of x, and of each projection's result."""

    inputs: int
    outputs: tuple[int, ...]


def products(hidden: int, wide: int, heads: int, narrow: int) -> list[Product]:
    """Return those of one layer; arguments as of ``wina.kernels.cuda.tune.step_shapes``."""
    return [
        Product(hidden, (wide, wide)),
        Product(wide, (hidden,)),
        Product(hidden, (heads, narrow, narrow)),
        Product(heads, (hidden,)),
    ]


def cuts(tile: int, product: Product, units: int) -> list[Cut]:
    """Return ways to cut a product up that fit a multiprocessor and fill a device.

    Args:
        tile: rows of x of a program.
        product: its shape.
        units: multiprocessors.
    """
    found = []
    usual = rule(tile, product.inputs, product.outputs, units)
    ways = itertools.product((64, 128, 256), (32, 64, 128), (3, 4, 6), (4, 8))
    for columns, channels, stages, warps in ways:
        tiles = sum(-(-size // columns) for size in product.outputs)
        shared = stages * channels * 2 * (columns + tile)
        if shared > MOST_SHARED or tile * columns > ACCUMULATED * 32 * warps:
            continue
        if (warps == 8 and tile * columns < 64 * 128) or (tile == 16 and channels < 64):
            continue  # too little work for a thread; steps too short
        together = max(1, min(MOST_SHARED // shared, 16 // warps))  # programs of a multiprocessor
        for share in {1, together, max(1, together // 2)}:
            split = round(share * units / tiles)
            if not 1 <= split <= 16 or split * channels * 2 > product.inputs:
                continue
            found.append(Cut(columns, channels, split, stages, warps))
    return list(dict.fromkeys([*([usual] if usual else []), *found]))


class Trial:
    """A product's tensors on a device, and what is timed on them."""

    def __init__(self, product: Product, rows: int, dtype: torch.dtype) -> None:
        """Make enough sets of weights."""
        options: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
        inputs, outputs = product.inputs, product.outputs
        self.copies = copies_of(inputs * sum(outputs) * dtype.itemsize)
        self.x = torch.randn(rows, inputs, **options)
        self.weights = [
            torch.randn(inputs, sum(outputs), **options).mul_(inputs**-0.5).t()
            for _ in range(self.copies)
        ]
        self.sizes = list(outputs)
        self.thresholds = torch.full((len(outputs), inputs), level_of(SPARSITY), device=DEVICE)
        self.flags = torch.ones(rows, dtype=torch.bool, device=DEVICE)
        self.biases: list[Tensor | None] = [None] * len(outputs)

    def masked(self, cut: Cut) -> Replay:
        """Capture the product cut up so."""

        def run(i: int) -> object:
            weights = torch.split(self.weights[i], self.sizes)
            vectors = list(self.thresholds)
            return masked_product(self.x, weights, vectors, self.biases, flags=self.flags, cut=cut)

        return Replay(run, self.copies)

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


def tune(product: Product, tile: int, dtype: torch.dtype, compiled: Sequence[Cut]) -> Cut | None:
    """Return the fastest of the cuts, or None where masked copies are no slower.

    Args:
        product: its shape.
        tile: rows of x, all sparse.
        dtype: float16 or bfloat16.
        compiled: the cuts to measure.
    """
    trial = Trial(product, tile, dtype)
    times: dict[Cut, float] = {}
    for cut in compiled:
        times[cut] = trial.masked(cut).time(REPLAYS).p50
    for cut in sorted(times, key=lambda one: times[one])[:CLOSE]:
        times[cut] = trial.masked(cut).time(3 * REPLAYS).p50
    copied = trial.copied().time(3 * REPLAYS).p50
    dense = trial.dense().time(3 * REPLAYS).p50
    best = min(times, key=lambda one: times[one], default=None)
    took = times[best] if best is not None else float("inf")
    key = cut_key(tile, product.inputs, product.outputs)
    note(f"{key}: {took:.1f} us, masked copies {copied:.1f}, dense {dense:.1f}; {best}")
    return best if took < copied else None


def extend(
    wanted: Sequence[Product], tiles: Sequence[int], dtype: torch.dtype, *, again: bool = False
) -> Mapping[str, Cut | None]:
    """Tune what the tables lack; each result is kept at once, so an interrupted run goes on.

    Args:
        wanted: the products.
        tiles: rows of x, each one of ``wina.kernels.triton.TILES``.
        dtype: float16 or bfloat16; they share what is found.
        again: tune what the tables have, too.

    Returns:
        By the product's name, also what the tables had; None where masked copies serve.
    """
    kind = device_kind(0)
    known = TABLE.of(kind)
    found: dict[str, Cut | None] = {}
    missing: list[tuple[Product, int]] = []
    for product, tile in itertools.product(dict.fromkeys(wanted), tiles):
        assert tile in TILES
        key = cut_key(tile, product.inputs, product.outputs)
        if key in known and not again:
            found[key] = known[key]
        else:
            missing.append((product, tile))
    units = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    jobs = [(product, tile, cuts(tile, product, units)) for product, tile in missing]
    # Compilers side by side, each with a device of its own; what they find is in Triton's cache.
    # Only then is the device quiet, and measured on.
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        ready = [
            [(cut, pool.submit(_compile, product, tile, dtype, cut)) for cut in some]
            for product, tile, some in jobs
        ]
        fitting = [[cut for cut, future in some if future.result()] for some in ready]
    for (product, tile, _), some in zip(jobs, fitting, strict=True):
        key = cut_key(tile, product.inputs, product.outputs)
        found[key] = tune(product, tile, dtype, some)
        TABLE.remember(kind, {key: found[key]})
    return found


def _compile(product: Product, tile: int, dtype: torch.dtype, cut: Cut) -> bool:
    """Compile by running once; False if it does not fit the device."""
    from triton.runtime.errors import OutOfResources

    options: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
    x = torch.zeros(tile, product.inputs, **options)
    weight = torch.zeros(product.inputs, sum(product.outputs), **options).t()
    weights = torch.split(weight, list(product.outputs))
    vectors = list(torch.zeros(len(product.outputs), product.inputs, device=DEVICE))
    flags = torch.ones(tile, dtype=torch.bool, device=DEVICE)
    try:
        masked_product(x, weights, vectors, [None] * len(weights), flags=flags, cut=cut)
    except OutOfResources:
        return False
    return True
