"""Shapes of what GPU kernels are launched for: their names in tables, those of a model, tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wina.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """A launch of the row kernel; for more tokens, a masked product.

    Attributes:
        inputs: features of x.
        outputs: of each projection; of the gate, which up equals, where ``gated``.
        gated: act(gate) * up in one launch.
        normed: x goes through an RMSNorm first.
        added: a residual is added to the first projection's result.
    """

    inputs: int
    outputs: tuple[int, ...]
    gated: bool = False
    normed: bool = False
    added: bool = False

    @property
    def projections(self) -> tuple[int, ...]:
        """Outputs of each projection, gate and up apart."""
        return self.outputs * 2 if self.gated else self.outputs

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.inputs * sum(self.projections)

    def key(self, tokens: int, dtype: torch.dtype) -> str:
        """Return the shape's name in the row kernel's table."""
        return shape_key(self.inputs, self.outputs, self.gated, tokens, dtype.itemsize)


def shape_key(inputs: int, outputs: Sequence[int], gated: bool, tokens: int, size: int) -> str:
    """Return the name of a shape in the row kernel's table; size: bytes of an element."""
    kind = "gated " if gated else ""
    return f"{kind}{inputs}->{'+'.join(map(str, outputs))} x{tokens} {8 * size}bit"


def step_shapes(hidden: int, wide: int, heads: int, narrow: int) -> list[Shape]:
    """Return the launches of one layer of a decode step.

    Args:
        hidden: features of the residual stream.
        wide: features between gate, up and down.
        heads: features of all queries.
        narrow: features of all keys.
    """
    return [
        Shape(hidden, (wide,), gated=True, normed=True),
        Shape(wide, (hidden,), added=True),
        Shape(hidden, (heads, narrow, narrow), normed=True),
        Shape(heads, (hidden,), added=True),
    ]


def sizes_of(config: Any) -> tuple[int, int, int, int]:
    """Return ``step_shapes``' arguments of a Transformers config.

    Raises:
        UsageError: the model is not one of dense layers with separate q, k, v, gate and up.
    """
    config = config.get_text_config()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes: list[Any] = [getattr(config, name, None) for name in names]
    experts = [getattr(config, name, None) for name in ("num_experts", "num_local_experts")]
    if not all(isinstance(size, int) for size in sizes) or any(experts):
        raise UsageError(
            f"no launches are known for a model of type {config.model_type!r}: it has not one "
            f"{', '.join(names)} for all layers, or has experts. Untuned, the built-in rule serves."
        )
    hidden, wide, heads, shared = sizes
    size = getattr(config, "head_dim", None) or hidden // heads
    return hidden, wide, heads * size, shared * size


def tiles_of(outputs: Sequence[int], columns: int) -> list[int]:
    """Return how many tiles of some columns each projection's outputs take."""
    return [-(-one // columns) for one in outputs]
