"""Which configuration of the kernels serves a shape: measured ones, else a rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from wina.kernels.cuda.rows import TOKENS, Config, list_bytes

LANES = (4, 8, 16, 32, 64)
SHARED = 160 << 10  # bytes of a block's shared memory that lists may take
LONG = 8192  # inputs from which a cluster shares the gating of one tile


def config_for(x: Tensor, outputs: Sequence[int], gated: bool) -> Config:
    """Return how to cut up W drop(x); see ``rows.Config``."""
    tokens = x.numel() // x.shape[-1]
    bucket = next(number for number in TOKENS if number >= tokens)
    device = x.device.index or 0
    return _rule(x.shape[-1], tuple(outputs), gated, bucket, x.element_size(), device)


@cache
def _rule(
    inputs: int, outputs: tuple[int, ...], gated: bool, tokens: int, size: int, device: int
) -> Config:
    """Give each multiprocessor one block, of the widest tile that still leaves none idle."""
    units = torch.cuda.get_device_properties(device).multi_processor_count
    width = 16 // size

    def tiles(lanes: int) -> int:
        return sum(-(-out // (lanes * width)) for out in outputs)

    lanes = next((one for one in LANES if tiles(one) <= units), LANES[-1])
    cluster = 1
    if inputs > LONG and lanes * 4 <= LANES[-1]:
        lanes, cluster = lanes * 4, 4
    while cluster < 8 and tiles(lanes) * cluster * 2 <= units and inputs >= 64 * width * cluster:
        cluster *= 2
    while cluster < 8 and list_bytes(inputs, cluster, gated, tokens, size) > SHARED:
        cluster *= 2
    threads = 512 if tokens < 8 else 256
    wide = tokens == 1 and lanes >= 16 and cluster == 1
    blocks = 1 if tokens > 2 or gated else 2
    return Config(lanes, max(1, threads // lanes), 8 if wide else 4, cluster, blocks)


def most_tokens(x: Tensor, gated: bool) -> int:
    """Return up to how many rows of x skipping is no slower than a dense product."""
    inputs, size = x.shape[-1], x.element_size()
    fitting = (n for n in reversed(TOKENS) if list_bytes(inputs, 8, gated, n, size) <= SHARED)
    return next(fitting, 0)
