"""Time launches as a decode step makes them.

They are captured in a CUDA graph, one after the other, over several sets of weights, so that the
cache holds none of them from the launch before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LAUNCHES = 16  # of a graph, at least
REPLAYS = 15
CACHES = 4  # times the second-level cache that what is read of all sets exceeds


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch: quantiles over replays."""

    p20: float
    p50: float
    p80: float


class Replay:
    """Launches on several sets of tensors in turn, captured in one CUDA graph."""

    def __init__(self, run: Callable[[int], object], copies: int) -> None:
        """Capture.

        Args:
            run: launches on the set of an index.
            copies: how many sets there are.
        """
        self.launches = copies * math.ceil(LAUNCHES / copies)
        self.graph = torch.cuda.CUDAGraph()
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run(0)  # kernels are compiled and libraries set up outside a capture
            stream.synchronize()
            # Not torch.cuda.graph, which collects garbage first: a tenth of a second each time.
            self.graph.capture_begin()
            self.kept = [run(i % copies) for i in range(self.launches)]
            self.graph.capture_end()

    def time(self, replays: int = REPLAYS) -> Timing:
        """Return the time of one of the launches."""
        times = []
        for replay in range(replays + 2):
            start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            if replay >= 2:
                times.append(start.elapsed_time(end) * 1e3 / self.launches)
        times.sort()
        return Timing(*(times[int(q * len(times))] for q in (0.2, 0.5, 0.8)))


def level_of(sparsity: float) -> float:
    """Return the threshold that drops this share of standard normal inputs."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(float(sparsity))))


def copies_of(size: float) -> int:
    """Return how many sets of weights are needed if a launch reads ``size`` bytes."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(CACHES * cache / size))
