"""Which configuration of the row kernel serves a shape: a measured one, else a rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from wina.kernels.cuda.rows import TOKENS, Config, shared_bytes
from wina.kernels.measured import Measured
from wina.kernels.shapes import shape_key, tiles_of

MOST_SHARED = 110 << 10  # bytes of a block's shared memory: two fit a multiprocessor
FEW = 4  # rows of x up to which skipping was found to pay where nothing was measured

TABLE = Measured(Path(__file__).with_name("configurations.json"), Config)


def config_for(x: Tensor, outputs: Sequence[int], gated: bool) -> Config | None:
    """Return how to cut up W drop(x), or None where a dense product is faster.

    Args:
        x: shape (..., inputs), CUDA.
        outputs: of each projection; of the gate where ``gated``.
        gated: act(gate) * up in one launch.
    """
    tokens = x.numel() // x.shape[-1]
    bucket = next((number for number in TOKENS if number >= tokens), None)
    if bucket is None:
        return None
    asked = (x.shape[-1], tuple(outputs), gated, bucket, x.element_size(), x.device.index or 0)
    return TABLE.once(asked, _config)


def _config(
    inputs: int, outputs: tuple[int, ...], gated: bool, tokens: int, size: int, device: int
) -> Config | None:
    def usual(units: int) -> Config | None:
        return None if tokens > FEW else rule(inputs, outputs, gated, tokens, size, units)

    return TABLE.best(device, shape_key(inputs, outputs, gated, tokens, size), usual)


def rule(
    inputs: int, outputs: Sequence[int], gated: bool, tokens: int, size: int, units: int
) -> Config | None:
    """Return a configuration for a shape that was not measured; None where none fits.

    Rows are read 256 bytes at a time where there are enough outputs, and clusters share a tile
    until the grid has one to one and a half blocks for each of ``units`` multiprocessors.
    """
    width = 16 // size

    def tiles(lanes: int) -> int:
        return sum(tiles_of(outputs, lanes * width))

    lanes = 16
    while lanes < 64 and tiles(lanes) > 2 * units:
        lanes *= 2
    while lanes > 4 and tiles(lanes) * 8 < units:
        lanes //= 2
    cluster = 1
    while cluster < 8 and 4 * cluster * tiles(lanes) <= 3 * units and inputs >= 512 * cluster:
        cluster *= 2
    threads = 512 if tokens <= 2 else 256
    while cluster <= 8:
        config = Config(lanes, threads // lanes, 4, cluster, 2 if tokens <= 2 else 1)
        if shared_bytes(config, inputs, gated, tokens, size) <= MOST_SHARED:
            return config
        cluster *= 2
    return None
