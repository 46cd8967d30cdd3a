"""The sparse form of linears that wina cannot compute itself: a gate in front of their forward.

Models quantized by other libraries are run this way: the input is masked and their own module
called, unchanged. It says what a plan costs in quality. It saves no time, since their kernels read
every weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from wina.layers.foreign import is_foreign
from wina.layers.linear import FALLBACKS, SparseLayer
from wina.selection import threshold_mask


class _Gate:
    """``forward`` of a masked layer: gated on the object, its own on the class.

    Some libraries replace ``forward`` on the object, and call the class's from there. As this is a
    data descriptor, what they put on the object does not hide it.
    """

    def __get__(self, layer: MaskedLayer | None, owner: type[MaskedLayer]) -> Callable[..., Any]:
        return owner.dense_class.forward if layer is None else layer.gated

    def __set__(self, layer: MaskedLayer, forward: Callable[..., Any]) -> None:
        vars(layer)["forward"] = forward

    def __delete__(self, layer: MaskedLayer) -> None:
        del vars(layer)["forward"]


class MaskedLayer(SparseLayer):
    """A foreign linear behind a gate; the class it was made from follows in the bases."""

    kernels = False
    forward = _Gate()

    def gated(self, x: Tensor) -> Tensor:
        """Return what the module makes of the masked input; see SparseLayer.forward."""
        return SparseLayer.forward(self, x)

    def mask(self, x: Tensor) -> Tensor:
        """Return True for the channels of ``x`` (..., in_features) that stay in sparse mode."""
        if self.keep is None:
            return threshold_mask(x, self.vector.to(x.device))  # offloaded modules have no place
        return super().mask(x)

    def _dense(self, x: Tensor) -> Tensor:
        return self._own(x)

    def _own(self, x: Tensor) -> Tensor:
        own = vars(self).get("forward")
        y: Tensor = self.dense_class.forward(self, x) if own is None else own(x)
        return y


_classes: dict[type[nn.Module], type[MaskedLayer]] = {}


def masked_class(module: nn.Module) -> type[SparseLayer] | None:
    """Return the masked form of a foreign linear's class; None if the module is none."""
    dense = type(module)
    if not is_foreign(module):
        return None
    if dense not in _classes:
        members = {"dense_class": dense, "__module__": __name__}
        _classes[dense] = type(f"Masked{dense.__name__}", (MaskedLayer, dense), members)
    return _classes[dense]


FALLBACKS.append(masked_class)
