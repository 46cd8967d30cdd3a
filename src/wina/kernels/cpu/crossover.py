"""Up to how many rows (tokens) skipping rows of W beats the dense kernel on the masked input.

Without a measurement the compiled default holds: 8 rows where wina's blocked product computes the
rest (16-bit weights on x86-64 without matrix units), else 32, where the row kernel and torch's
dense one meet on a weight stored input-major (docs/kernels.md). ``measure_crossover`` replaces it
for this machine, library, thread count and shape; the result is kept in the cache folder and read
when the backend is loaded. ``ensure_crossover`` measures what is not known yet, before a batch is
decoded.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from wina.files import cached, write_text
from wina.kernels.cpu.library import DTYPES, PATH, input_major, instruction_set, set_crossover

ROWS = (2, 4, 8, 12, 16, 24, 32, 48, 64)
COLD = 96 << 20  # bytes of weights taken in turn, so that a step's come from memory as in decoding
COPIES = 256  # of a weight, at most
_NEVER, _ALWAYS = 0, 1 << 40


def measure_crossover(
    shapes: Iterable[tuple[int, int]],
    dtype: torch.dtype = torch.bfloat16,
    sparsity: float = 0.5,
    repeats: int = 5,
) -> dict[tuple[int, int], int]:
    """Measure, use from now on and store the crossover of each shape; about a second a shape.

    The masks are random and differ between tokens, which is the worst case for skipping. Weights
    are copies taken in turn: one alone would stay in the cache, where a dense product gains more.

    Args:
        shapes: (in_features, out_features) of weights.
        dtype: float32, float16 or bfloat16.
        sparsity: share of the channels that each token drops.
        repeats: timings of each row count; the median counts.

    Returns:
        For each shape the largest row count of ``ROWS`` up to which skipping was no slower, at
        least 1.
    """
    found = {}
    for inputs, outputs in dict.fromkeys(shapes):
        found[inputs, outputs] = _measure(inputs, outputs, dtype, sparsity, repeats)
        set_crossover(dtype, inputs, outputs, found[inputs, outputs])
    _store(dtype, found)
    return found


def ensure_crossover(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> None:
    """Measure the shapes that no stored measurement of this machine and thread count has."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return
    load_crossover()
    known = _read(_path()).get(str(dtype).removeprefix("torch."), {})
    missing = [one for one in dict.fromkeys(shapes) if f"{one[0]}x{one[1]}" not in known]
    if missing:
        measure_crossover(missing, dtype)


def load_crossover() -> None:
    """Use the stored measurements of this machine and thread count, if any."""
    for name, shapes in _read(_path()).items():
        for shape, rows in shapes.items():
            inputs, outputs = (int(size) for size in shape.split("x"))
            set_crossover(getattr(torch, name), inputs, outputs, rows)


def _measure(inputs: int, outputs: int, dtype: torch.dtype, sparsity: float, repeats: int) -> int:
    weight = input_major(torch.randn(outputs, inputs).to(dtype))
    copies = min(COPIES, COLD // (weight.numel() * weight.element_size()))
    weights = [weight, *(input_major(weight) for _ in range(copies))]
    thresholds = torch.full((inputs,), sparsity)
    best = 1
    for rows in ROWS:
        x = torch.rand(rows, inputs).to(dtype)
        times: dict[int, list[float]] = {_NEVER: [], _ALWAYS: []}
        for _ in range(repeats):
            for limit, seconds in times.items():
                set_crossover(dtype, inputs, outputs, limit)
                seconds.append(_seconds(x, weights, thresholds))
        if sorted(times[_ALWAYS])[repeats // 2] > sorted(times[_NEVER])[repeats // 2]:
            break
        best = rows
    return best


def _seconds(x: Tensor, weights: list[Tensor], thresholds: Tensor) -> float:
    start = time.perf_counter()
    for weight in weights:
        torch.ops.wina.sparse_linear(x, weight, thresholds, [])
    return time.perf_counter() - start


def _path() -> Path:
    facts = (
        platform.machine(),
        _processor(),
        instruction_set(),
        torch.__version__,
        torch.get_num_threads(),
        hashlib.sha256(PATH.read_bytes()).hexdigest(),  # other kernels, other crossovers
        (ROWS, COLD),
    )
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return cached("crossover", f"{key}.json")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def _read(path: Path) -> dict[str, dict[str, int]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): {str(shape): int(rows) for shape, rows in shapes.items()}
            for name, shapes in content.items()
            if str(name) in DTYPES
        }
    except (OSError, ValueError, AttributeError):
        return {}  # absent or damaged: the default serves until the next measurement


def _store(dtype: torch.dtype, found: dict[tuple[int, int], int]) -> None:
    path = _path()
    content = _read(path)
    name = str(dtype).removeprefix("torch.")
    shapes = content.setdefault(name, {})
    shapes.update({f"{inputs}x{outputs}": rows for (inputs, outputs), rows in found.items()})
    write_text(path, json.dumps(content, indent=1))
