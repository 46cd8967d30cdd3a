"""How fast memory can be read: what any decode step is bounded by."""

from __future__ import annotations

import os
import statistics
import time

import torch
from torch import Tensor

from wina.kernels import available_backends

BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}  # far beyond any cache


class Probe:
    """Reads one large block of memory; each ``run`` adds a timing."""

    def __init__(self, device: torch.device) -> None:
        self.block: Tensor = torch.ones(BYTES.get(device.type, 1 << 30) // 4, device=device)
        self.seconds: list[float] = []

    def run(self) -> None:
        """Read the block once."""
        synchronize(self.block.device)
        start = time.perf_counter()
        if self.block.device.type == "cpu" and "cpu" in available_backends():
            from wina.kernels.cpu import stream

            stream(self.block)
        else:
            self.block.amax()
        synchronize(self.block.device)
        self.seconds.append(time.perf_counter() - start)

    @property
    def gbps(self) -> float:
        """Median read bandwidth, GB/s (10^9 bytes)."""
        return self.block.nbytes / statistics.median(self.seconds) / 1e9


def last_level_cache(device: torch.device) -> int:
    """Return the last-level cache in bytes; 32 MiB if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    for name in ("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE"):
        if name in getattr(os, "sysconf_names", {}) and os.sysconf(name) > 0:
            return os.sysconf(name)
    return 32 << 20


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device; others have nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
