"""The CPU backend: compiled kernels that skip the rows of dropped channels."""

from functools import cache

from wina.kernels.cpu import library
from wina.kernels.cpu.crossover import (
    ensure_crossover,
    load_crossover,
    measure_crossover,
)
from wina.kernels.cpu.library import (
    Arena,
    input_major,
    instruction_set,
    set_crossover,
    stream,
    use_instruction_set,
)

__all__ = [
    "Arena",
    "ensure_crossover",
    "input_major",
    "instruction_set",
    "load",
    "measure_crossover",
    "set_crossover",
    "stream",
    "use_instruction_set",
]


@cache
def load() -> str | None:
    """Register the kernels with this machine's crossover; return None, or why they cannot run."""
    reason = library.load()
    if reason is None:
        load_crossover()
    return reason
