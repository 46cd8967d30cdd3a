"""Numbers that the blocks of a GPU kernel draw, so that a tile's last one knows that it is last."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

COUNT = 1 << 18  # tickets of a device

_held: dict[torch.device, dict[tuple[int, int], Tensor]] = {}


def tickets(device: torch.device, weight: int, tiles: int) -> Tensor:
    """Return a launch's tickets, int32, at least one a tile, all 0 between launches.

    Each weight has its own, so that two models may run side by side; the same weight must not be
    in two launches at the same time. (Past ``COUNT`` of them the first are given again.)

    Args:
        device: of the launch.
        weight: address of the first projection's.
        tiles: of the launch, whose blocks share their channels.
    """
    held = _held.setdefault(device, {})
    number = -(-tiles // 4) * 4  # aligned, whichever come before
    if (weight, number) not in held:
        used = sum(count for _, count in held)
        if used + number > COUNT:
            held.clear()
            used = 0
        held[weight, number] = of_device(device)[used : used + number]
    return held[weight, number]


@cache
def of_device(device: torch.device) -> Tensor:
    """Return all tickets of a device, shape (COUNT,)."""
    return torch.zeros(COUNT, dtype=torch.int32, device=device)
