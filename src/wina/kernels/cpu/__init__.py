"""The CPU backend: compiled kernels that skip the rows of dropped channels."""

from wina.kernels.cpu.library import (
    input_major,
    instruction_set,
    load,
    stream,
    use_instruction_set,
)

__all__ = ["input_major", "instruction_set", "load", "stream", "use_instruction_set"]
