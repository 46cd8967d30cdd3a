"""How operators take what may be absent: as lists of tensors.

Biases are none for an empty list, else one for each projection; an empty tensor is no bias. A norm
or a residual is a list of one, or of none. (Not ``Tensor?``: torch's stable C interface passes
lists alike in all versions.)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def pack_biases(x: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Return biases as an operator takes them; x: whose dtype and device they have."""
    if all(bias is None for bias in biases):
        return []
    return [x.new_empty(0) if bias is None else bias for bias in biases]


def unpack_biases(biases: Sequence[Tensor], count: int) -> list[Tensor | None]:
    """Return the biases of ``count`` projections."""
    return [bias if bias.numel() else None for bias in biases] or [None] * count


def only(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return a norm or a residual."""
    return tensors[0] if tensors else None
