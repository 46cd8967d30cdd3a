"""Measure which configuration of the row kernel serves a shape best, beside a dense product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wina.kernels.cuda import rows
from wina.kernels.cuda.compile import compiled, mapping
from wina.kernels.cuda.table import MOST_SHARED, TABLE, rule
from wina.kernels.replay import REPLAYS, Replay, copies_of, level_of
from wina.kernels.shapes import Shape, tiles_of
from wina.progress import note

DEVICE = torch.device("cuda")
SPARSITIES = (0.5, 0.65)  # a configuration is judged by the sum of its times at these
SIZES = (256, 384, 512)  # threads of a block
COMPILERS = 16  # programs compiled side by side
MOST_APART = 16  # blocks of a tile that are no cluster


class Trial:
    """A shape's tensors on a device, and what is timed on them."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, live: float) -> None:
        """Make enough sets of weights.

        Args:
            shape: of the launch.
            tokens: rows of x.
            dtype: of x and the weights.
            live: the smallest share of the rows that a launch reads.
        """
        self.shape, self.dtype = shape, dtype
        self.copies = copies_of(shape.weights * dtype.itemsize * live)
        options: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
        outputs = shape.projections
        self.x = torch.randn(self.copies, tokens, shape.inputs, **options)
        self.weights = [
            [torch.randn(shape.inputs, n, **options).mul_(shape.inputs**-0.5).t() for n in outputs]
            for _ in range(self.copies)
        ]
        self.biases: list[Tensor | None] = [None] * len(outputs)
        self.norm = torch.ones(shape.inputs, **options) if shape.normed else None
        self.residual = torch.randn(tokens, outputs[0], **options) if shape.added else None
        self.thresholds = torch.zeros(shape.inputs, device=DEVICE)

    def sparse(self, config: rows.Config) -> Replay:
        """Capture launches; ``drop`` sets which channels they drop."""
        thresholds = [self.thresholds] * len(self.biases)
        options: dict[str, Any] = {"norm": self.norm, "epsilon": 1e-5, "residual": self.residual}
        if self.shape.gated:
            options["activation"] = "silu"

        def run(i: int) -> object:
            return rows.rows(self.x[i], self.weights[i], thresholds, self.biases, config, **options)

        return Replay(run, self.copies)

    def drop(self, sparsity: float) -> None:
        """Set thresholds that drop this share of the inputs, which are standard normal."""
        self.thresholds.fill_(level_of(sparsity))

    def dense(self, input_major: bool = True) -> Replay:
        """Capture the dense products alone, by torch; for the usual layout a copy is made."""
        weights = self.weights
        if not input_major:
            weights = [[w.contiguous() for w in some] for some in weights]

        def run(i: int) -> object:
            return [functional.linear(self.x[i], w) for w in weights[i]]

        return Replay(run, self.copies)


def cuts(shape: Shape, tokens: int, size: int, units: int) -> list[rows.Config]:
    """Return ways to cut a shape into blocks, with a middling way to keep rows under way."""
    found = []
    width = 16 // size
    for lanes, cluster, threads in itertools.product((8, 16, 32, 64), (1, 2, 4, 8), SIZES):
        blocks = cluster * sum(tiles_of(shape.outputs, lanes * width))
        if not 0.9 * units <= blocks * threads / 512 <= 2.2 * units:
            continue
        small = tokens <= 2
        config = rows.Config(
            lanes,
            threads // lanes,
            4,
            cluster,
            (1024 if shape.gated else 1152) // threads if small else 512 // threads,
        )
        found += [config] if _fits(config, shape, tokens, size) else []
    if tokens <= 2:
        found += _apart(shape, tokens, size, units)
    usual = rule(shape.inputs, shape.outputs, shape.gated, tokens, size, units)
    return list(dict.fromkeys([*([usual] if usual else []), *found]))


def _apart(shape: Shape, tokens: int, size: int, units: int) -> list[rows.Config]:
    """Return cuts whose blocks are no clusters: as many as fill the device evenly."""
    found = []
    width = 16 // size
    for lanes, threads, blocks in itertools.product((8, 16, 32, 64), SIZES, (1, 2, 3)):
        tiles = sum(tiles_of(shape.outputs, lanes * width))
        split = blocks * units // tiles
        if blocks * threads > (1024 if shape.gated else 1536) or not 2 <= split <= MOST_APART:
            continue
        if split * tiles < 0.9 * blocks * units:
            continue
        config = rows.Config(lanes, threads // lanes, 4, split, blocks, far=1)
        found += [config] if _fits(config, shape, tokens, size) else []
    return found


def streams(config: rows.Config, shape: Shape, tokens: int, size: int) -> list[rows.Config]:
    """Return ways to keep rows under way, and hints, for one way to cut."""
    kinds = [(1, 4), (1, 6), (1, 8), (0, 4), (0, 8)]
    kinds += [(2, 4), (2, 6), (2, 8)] if shape.gated else []  # elsewhere they never came first
    found = [replace(config, loads=loads, unroll=unroll) for loads, unroll in kinds]
    if config.cluster > 1 and rows.gates_whole(config, shape.inputs, tokens, size):
        found += [replace(one, whole=1) for one in found]
    found.append(replace(config, prefetch=128))
    found += [replace(config, ahead=threads) for threads in (32, 64)]
    if config.blocks > 1:
        found.append(replace(config, blocks=config.blocks // 2))
    return [one for one in found if _fits(one, shape, tokens, size)]


def _fits(config: rows.Config, shape: Shape, tokens: int, size: int) -> bool:
    needed = rows.shared_bytes(config, shape.inputs, shape.gated, tokens, size)
    return needed <= (2 * MOST_SHARED // config.blocks if config.blocks > 1 else MOST_SHARED)


def compile_all(
    configs: Iterable[rows.Config], shape: Shape, tokens: int, dtype: torch.dtype
) -> None:
    """Compile configurations side by side into the cache folder."""
    capability = torch.cuda.get_device_capability()
    programs = [
        mapping(
            rows.macros_of(one, dtype, shape.inputs, tokens, gated=shape.gated, norm=shape.normed)
        )
        for one in configs
    ]
    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(lambda macros: compiled("rows.cu", macros, capability), programs))


def tune(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    sparsities: Sequence[float] = SPARSITIES,
    log: Callable[[str, rows.Config, dict[float, float]], None] | None = None,
) -> rows.Config | None:
    """Return the fastest configuration, or None where a dense product is no slower.

    First the cut into blocks is chosen, then how rows are kept under way.

    Args:
        shape: of the launch.
        tokens: rows of x, one of ``rows.TOKENS``; their masks are independent, which is the
            worst case for skipping.
        dtype: of x and the weights.
        sparsities: a configuration is judged by the sum of its times at these.
        log: called with the shape's key, each configuration and its times in microseconds.
    """
    units = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    trial = Trial(shape, tokens, dtype, 1 - max(sparsities))
    key = shape.key(tokens, dtype)
    seen: dict[rows.Config, float] = {}

    def measure(config: rows.Config, replays: int) -> dict[float, float]:
        launches, times = trial.sparse(config), {}
        for sparsity in sparsities:
            trial.drop(sparsity)
            times[sparsity] = launches.time(replays).p50
        return times

    def judge(configs: list[rows.Config]) -> rows.Config | None:
        fresh = [one for one in configs if one not in seen]
        compile_all(fresh, shape, tokens, dtype)
        for config in fresh:
            times = measure(config, REPLAYS)
            seen[config] = sum(times.values())
            if log is not None:
                log(key, config, times)
        return min(seen, key=lambda one: seen[one], default=None)

    best = judge(cuts(shape, tokens, dtype.itemsize, units))
    if best is None:
        return None
    best = judge(streams(best, shape, tokens, dtype.itemsize))
    assert best is not None
    # Once more for those close to the best: the first look is a short one.
    close = [one for one in seen if seen[one] <= 1.02 * seen[best]][:6]
    for config in close:
        seen[config] = sum(measure(config, 3 * REPLAYS).values())
    best = min(close, key=lambda one: seen[one])
    dense = trial.dense().time(3 * REPLAYS).p50
    mean = seen[best] / len(sparsities)
    note(f"{key}: {mean:.1f} us, dense {dense:.1f} us, {best}")
    return best if mean < dense else None


def extend(
    shapes: Iterable[Shape], tokens: Sequence[int], dtype: torch.dtype, *, again: bool = False
) -> Mapping[str, rows.Config | None]:
    """Tune what the tables lack; each result is kept at once, so an interrupted run goes on.

    Args:
        shapes: of the launches.
        tokens: rows of x, each one of ``rows.TOKENS``.
        dtype: of x and the weights.
        again: tune what the tables have, too.

    Returns:
        By the shape's name, also what the tables had; None where a dense product is no slower.
    """
    wanted = {
        shape.key(number, dtype): (shape, number)
        for shape, number in itertools.product(shapes, tokens)
    }
    return TABLE.extend(wanted, lambda missing: (tune(*one, dtype) for one in missing), again=again)
