"""Which configuration of the kernels serves a shape: measured ones, else a rule.

Measured ones come from a table shipped with the package and from ``wina autotune``, which keeps
what it finds in the cache folder. Both are JSON: device kind -> shape -> the fields of
``rows.Config``, or null where a dense product was faster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wina.files import cached, write_text
from wina.kernels.cuda.rows import TOKENS, Config, shared_bytes

SHIPPED = Path(__file__).with_name("configurations.json")
MOST_SHARED = 110 << 10  # bytes of a block's shared memory: two fit a multiprocessor
FEW = 4  # rows of x up to which skipping was found to pay where nothing was measured

Table = dict[str, dict[str, dict[str, int] | None]]


def device_kind(device: int) -> str:
    """Return what configurations depend on of a CUDA device: its architecture and its size."""
    found = torch.cuda.get_device_properties(device)
    return f"sm_{found.major}{found.minor}/{found.multi_processor_count}"


def shape_key(inputs: int, outputs: Sequence[int], gated: bool, tokens: int, size: int) -> str:
    """Return the name of a shape in the table; size: bytes of an element."""
    kind = "gated " if gated else ""
    return f"{kind}{inputs}->{'+'.join(map(str, outputs))} x{tokens} {8 * size}bit"


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
    device = x.device.index or 0
    return _config(x.shape[-1], tuple(outputs), gated, bucket, x.element_size(), device)


@cache
def _config(
    inputs: int, outputs: tuple[int, ...], gated: bool, tokens: int, size: int, device: int
) -> Config | None:
    known = _known().get(device_kind(device), {})
    key = shape_key(inputs, outputs, gated, tokens, size)
    if key in known:
        fields = known[key]
        return None if fields is None else Config(**fields)
    if tokens > FEW:
        return None
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return rule(inputs, outputs, gated, tokens, size, units)


def rule(
    inputs: int, outputs: Sequence[int], gated: bool, tokens: int, size: int, units: int
) -> Config | None:
    """Return a configuration for a shape that was not measured; None where none fits.

    Rows are read 256 bytes at a time where there are enough outputs, and clusters share a tile
    until the grid has one to one and a half blocks for each of ``units`` multiprocessors.
    """
    width = 16 // size

    def tiles(lanes: int) -> int:
        return sum(-(-out // (lanes * width)) for out in outputs)

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


def remember(kind: str, found: Mapping[str, Config | None]) -> Path:
    """Keep measured configurations in the cache folder, beside those already there."""
    path = _path()
    table = _read(path)
    entries = {key: None if one is None else asdict(one) for key, one in found.items()}
    table.setdefault(kind, {}).update(entries)
    write_text(path, json.dumps(table, indent=1, sort_keys=True))
    forget()
    return path


def forget() -> None:
    """Read the tables anew at the next call."""
    _known.cache_clear()
    _config.cache_clear()


@cache
def _known() -> Table:
    table = _read(SHIPPED)
    for kind, entries in _read(_path()).items():
        table.setdefault(kind, {}).update(entries)
    return table


def _path() -> Path:
    return cached("gpu", "configurations.json")


def _read(path: Path) -> Table:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(kind): {
                str(key): None if fields is None else asdict(Config(**fields))
                for key, fields in entries.items()
            }
            for kind, entries in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # absent or damaged: the rule serves until the next measurement
