"""The sparse form of linears that another library keeps: a gate in front of their forward.

Models quantized by other libraries are run this way: the input is masked and their own module
called, unchanged. That alone says what a plan costs in quality and saves no time, since their
kernels read every weight. Where the weight is made of 8- or 4-bit codes and scales,
``lay_out_for_decode`` keeps a copy of those (wina.layers.quantized), and wina's kernels decode with
it, reading live channels alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from wina.kernels.cpu import Arena
from wina.kernels.quantized import by_block
from wina.layers.foreign import is_foreign
from wina.layers.linear import FALLBACKS, SparseLayer
from wina.layers.quantized import NO_THRESHOLDS, drop, multiply, packed, read, store, store_dense
from wina.selection import threshold_mask


class _Gate:
    """``forward`` of a masked layer: gated on the object, its own on the class.

    Some libraries replace ``forward`` on the object, and call the class's from there. As this is a
    data descriptor, what they put on the object does not hide it.
    """

    def __get__(self, layer: Any, owner: Any) -> Callable[..., Any]:
        found: Callable[..., Any] = owner.dense_class.forward if layer is None else layer.gated
        return found

    def __set__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        vars(layer)["forward"] = forward

    def __delete__(self, layer: nn.Module) -> None:
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


class PackedLinear(nn.Module):
    """A dense foreign linear (the head) whose few rows wina's kernels compute from its codes."""

    dense_class: ClassVar[type[nn.Module]]
    forward = _Gate()

    def gated(self, x: Tensor) -> Tensor:
        """Return W x + b."""
        vector, bias = self.get_buffer(NO_THRESHOLDS), getattr(self, "bias", None)
        found = multiply(self, x, vector, bias)
        if found is not None:
            return found
        own = vars(self).get("forward")
        y: Tensor = self.dense_class.forward(self, x) if own is None else own(x)
        return y


def pack_layer(layer: MaskedLayer, arena: Arena) -> bool:
    """Keep a masked layer's codes for the kernels; return whether it is made of codes."""
    if packed(layer) is None:
        weight = read(layer, arena)
        if weight is None:
            return False
        store(layer, weight)
    return True


def pack_head(head: nn.Module, arena: Arena) -> None:
    """Let the kernels decode with a dense foreign linear, in place, if it is made of codes."""
    if not is_foreign(head):
        return
    weight = read(head)
    if weight is None:
        return
    if weight.codes.device.type == "cpu":
        weight = by_block(weight, arena)
    dense = type(head)
    members = {"dense_class": dense, "__module__": __name__}
    head.__class__ = type(f"Packed{dense.__name__}", (PackedLinear, dense), members)
    store_dense(head, weight)


def unpack_head(head: nn.Module) -> None:
    """Undo ``pack_head``."""
    if isinstance(head, PackedLinear):
        drop(head)
        head.__class__ = head.dense_class  # type: ignore[assignment]


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
