"""Compute in float32 where the processor has no products of 16 bits.

There torch multiplies bfloat16 and float16 many times slower than float32. Whole texts, and
gradients most of all, then take minutes instead of seconds. Decoding has kernels of its own and
stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from torch import nn

from wina.kernels import multiplies
from wina.layers.linear import read_by_others
from wina.progress import note

ROOM = 2.0  # times the bytes of the float32 weights: activations and gradients come to them


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Hold a model's 16-bit weights in float32 inside the block, if that is how to be fast.

    The values are the same; what is computed of them is no longer rounded to 16 bits in between.
    The 16-bit tensors are kept and put back, to the bit and in their places. Where memory does not
    suffice, or another library keeps the weights, the model stays as it is, and that is said.

    Args:
        model: whose parameters are neither replaced nor changed inside the block.
    """
    narrow = [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.device.type == "cpu" and not multiplies(tensor.dtype)
    ]
    if not narrow:
        yield
        return
    name = str(narrow[0][0].dtype).removeprefix("torch.")
    slow = f"this processor has no {name} products, and torch is slow without"
    needed = ROOM * sum(4 * tensor.numel() for tensor, _ in narrow)
    if read_by_others(model):
        _say(f"{slow}: --dtype float32 is faster")
        yield
    elif needed > _available():
        _say(f"{slow}; float32 would be faster but wants {needed / 1e9:.1f} GB of free memory")
        yield
    else:
        _say(f"{slow}: computing in float32 from the same weights")
        try:
            for tensor, data in narrow:
                tensor.data = data.float()
            yield
        finally:
            for tensor, data in narrow:
                tensor.data = data


@cache
def _say(text: str) -> None:
    note(text)  # once


def _available() -> float:
    """Return the free bytes of memory; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * int(found[0]) if found else float("inf")
