"""The sparse form of each kind of linear layer.

A sparse layer is the original module with another class: the same object, parameters, names,
hooks and memory, plus one float32 buffer, and one for the bias that a tuned plan adds.
(torch.nn.utils.parametrize changes classes in the same way.) That is why a sparsified model saves
under its original parameter names, and why making it dense again restores it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wina.errors import UsageError
from wina.kernels import dense_linear, multiplies, sparse_linear
from wina.layers.foreign import dequantized, is_foreign, shape_of
from wina.layers.phase import Phase
from wina.layers.quantized import NO_THRESHOLDS, multiply
from wina.layers.quantized import drop as drop_codes
from wina.selection import Selection, oracle_mask, random_mask, threshold_mask, topk_mask

FEW = 16  # rows up to which a dense call on an input-major weight goes to wina's kernel


class SparseLayer(nn.Module):
    """What all sparse layers share; the class they were made from follows in the bases.

    Attributes:
        selection: how channels are chosen.
        keep: channels kept of each token with top-k, else None.
        phase: which positions are sparse, shared over the model.
        active: False when the vector drops nothing, so that 0 % sparsity is bit-equal to dense.
        sparse_bias: added to the output on sparse positions, shape (out_features,), the weight's
            dtype; or None.
    """

    dense_class: ClassVar[type[nn.Module]]
    kernels: ClassVar[bool] = True  # wina computes it, from a weight that it can read
    selection: Selection
    keep: int | None
    phase: Phase
    active: bool
    sparse_bias: Tensor | None
    has_zero_columns: bool = False  # W has some, as a weight in a basis may

    @property
    def vector_name(self) -> str:
        """Name of the buffer of shape (in_features,): thresholds t_j, or scales s_j of top-k."""
        return "thresholds" if self.selection == "threshold" else "scales"

    @property
    def vector(self) -> Tensor:
        """The thresholds or the scales, shape (in_features,), float32."""
        return self.get_buffer(self.vector_name)

    def mask(self, x: Tensor) -> Tensor:
        """Return True for the channels of ``x`` (..., in_features) that stay in sparse mode."""
        if self.keep is None:
            return threshold_mask(x, self.vector)
        if self.selection == "random":
            return random_mask(x, self.keep)
        if self.selection == "oracle":
            return oracle_mask(x, matrix(self), self.keep)
        return topk_mask(x, self.vector, self.keep)

    def forward(self, x: Tensor) -> Tensor:
        """Return W (mask o x) + b on sparse positions and W x + b on dense ones.

        Args:
            x: inputs, shape (..., in_features).
        """
        rows = self.phase.rows
        if rows is True and self.keep is None:
            found = multiply(self, x, self.vector, self._decode_bias())
            if found is not None:
                return found
        if rows is False or not self.active:
            return self._dense(x)
        if rows is True and self.keep is None and self.kernels:
            return sparse_linear(x, matrix(self), self.vector, self._decode_bias())
        mask = self.mask(x)
        if isinstance(rows, Tensor):
            mask = mask | ~align(rows, x)
        y = self._own(torch.where(mask, x, 0))
        if self.sparse_bias is None:
            return y
        return y + self.sparse_bias * (align(rows, x) if isinstance(rows, Tensor) else 1)

    def _dense(self, x: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        own = x.device.type == "cpu" and (x.dtype == torch.bfloat16 or _are_few(x))
        if own and isinstance(self, nn.Linear) and weight is not None and weight.stride(0) == 1:
            # Torch's dense kernels take up to twice their time for this layout.
            return dense_linear(x, weight, self._parameters["bias"])
        return self._own(x)

    def _own(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]

    def _decode_bias(self) -> Tensor | None:
        own: Tensor | None = getattr(self, "bias", None)
        if self.sparse_bias is None or own is None:
            return own if self.sparse_bias is None else self.sparse_bias
        return own + self.sparse_bias

    def changed(self) -> None:
        """Do what must follow a change of the vector; here nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the vector with the module, but never change its dtype."""
        before = self.vector
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.vector.dtype != before.dtype:
            self._buffers[self.vector_name] = before.to(self.vector.device)
        return self


def _are_few(x: Tensor) -> bool:
    return x.numel() <= FEW * x.shape[-1]


def align(rows: Tensor, x: Tensor) -> Tensor:
    """Return ``rows`` (positions,) in a shape that broadcasts over ``x`` (..., in_features).

    Some decoders flatten batch and positions before the MLP, and the head may see only the last
    positions.
    """
    seen = x.shape[-2]
    if seen % len(rows) == 0:
        return rows.repeat(seen // len(rows))[:, None]
    return rows[-seen:, None]


class SparseLinear(SparseLayer, nn.Linear):
    """torch.nn.Linear, sparse."""

    dense_class = nn.Linear


class RowsLinear(nn.Linear):
    """A dense torch.nn.Linear (the head) that gives few rows on the CPU to wina's own kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b."""
        vector = self._buffers.get(NO_THRESHOLDS)
        found = None if vector is None else multiply(self, x, vector, self.bias)
        if found is not None:
            return found
        if x.device.type == "cpu" and (_are_few(x) or not multiplies(x.dtype)):
            return dense_linear(x, self.weight, self.bias)
        return super().forward(x)


class SparseConv1D(SparseLayer, Conv1D):  # type: ignore[misc]
    """transformers' Conv1D (GPT-2), sparse; its weight is stored input-major."""

    dense_class = Conv1D


SPARSE_CLASSES: dict[type[nn.Module], type[SparseLayer]] = {
    sparse.dense_class: sparse for sparse in (SparseLinear, SparseConv1D)
}
# What may have a sparse form of other modules; asked where no class in SPARSE_CLASSES fits, and of
# nn.Linear and Conv1D, whose weights may be of another kind than ours.
FALLBACKS: list[Callable[[nn.Module], type[SparseLayer] | None]] = []
_known: set[str] = set()  # qualified names of subclasses of nn.Linear that compute as it does


def know_linear(qualified_name: str) -> None:
    """Let a subclass of nn.Linear that computes W x + b be sparsified, without importing it."""
    _known.add(qualified_name)


def sparse_class(dense: type[nn.Module]) -> type[SparseLayer] | None:
    """Return the sparse form of a class of linears; None if there is none.

    Subclasses have none unless ``know_linear`` named them, since they may compute otherwise.
    """
    if dense not in SPARSE_CLASSES and f"{dense.__module__}.{dense.__qualname__}" in _known:
        members = {"dense_class": dense, "__module__": __name__}
        SPARSE_CLASSES[dense] = type(f"Sparse{dense.__name__}", (SparseLayer, dense), members)
    return SPARSE_CLASSES.get(dense)


def sparse_form(module: nn.Module) -> type[SparseLayer] | None:
    """Return the class of a module's sparse form; None if there is none."""
    known = sparse_class(type(module))
    if known is None or issubclass(known.dense_class, (nn.Linear, Conv1D)):
        for find in FALLBACKS:
            if (form := find(module)) is not None:
                return form
    return known


def matrix(module: nn.Module) -> Tensor:
    """Return a linear layer's W, shape (out_features, in_features), whatever its storage.

    Of a linear that another library keeps it is a copy, and takes as long as a forward pass of
    in_features rows.
    """
    if is_read_by_others(module):
        return dequantized(module)
    weight: Tensor = module.weight  # type: ignore[assignment]  # a view where it is an expert's
    return weight.t() if isinstance(module, Conv1D) else weight


def features(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer, sparse or dense."""
    shape = shape_of(module) if is_read_by_others(module) else matrix(module).shape
    return shape[1], shape[0]


def is_read_by_others(module: nn.Module) -> bool:
    """Return whether only another library can read the linear's weight."""
    return not module.kernels if isinstance(module, SparseLayer) else is_foreign(module)


def read_by_others(model: nn.Module) -> list[str]:
    """Return the names of a model's linears whose weights only another library can read."""
    return [name for name, module in model.named_modules() if is_read_by_others(module)]


def is_linear(module: nn.Module) -> bool:
    """Return whether wina has a sparse form of this module, or it is one."""
    return isinstance(module, (SparseLayer, RowsLinear)) or sparse_form(module) is not None


def make_sparse(
    module: nn.Module,
    vector: Tensor,
    selection: Selection,
    keep: int | None,
    phase: Phase,
    sparse_bias: Tensor | None = None,
) -> None:
    """Turn a linear layer into its sparse form, in place.

    Args:
        module: an nn.Linear or Conv1D, a subclass that ``know_linear`` named, or a linear that
            another library keeps.
        vector: thresholds or scales, shape (in_features,), float32.
        selection: how channels are chosen.
        keep: with top-k, the channels kept of each token.
        phase: shared over the model.
        sparse_bias: added to the output on sparse positions, shape (out_features,), or None.

    Raises:
        UsageError: wina has no sparse form of the module's class.
    """
    form = sparse_form(module)
    if form is None:
        raise UsageError(f"no sparse form of {type(module).__qualname__} is known")
    module.__class__ = form
    assert isinstance(module, SparseLayer)
    module.selection, module.keep, module.phase = selection, keep, phase
    set_vectors(module, vector, sparse_bias)


def set_vectors(module: SparseLayer, vector: Tensor, sparse_bias: Tensor | None) -> None:
    """Give a sparse layer new tensors for its vector and bias; the old ones are left as they are.

    Args:
        module: the layer.
        vector: as in ``make_sparse``.
        sparse_bias: as in ``make_sparse``.
    """
    module.register_buffer(module.vector_name, vector)
    if sparse_bias is not None:
        sparse_bias = sparse_bias.to(_bias_dtype(module))
    module.register_buffer("sparse_bias", sparse_bias)
    refresh(module)


def _bias_dtype(module: SparseLayer) -> torch.dtype:
    """Return what a layer computes in; of another library's, the dtype of its bias or scales."""
    if module.kernels:
        return matrix(module).dtype
    tensors = {**module._parameters, **module._buffers, module.vector_name: None}
    given = [tensors.get("bias"), *tensors.values()]
    floats = [x.dtype for x in given if x is not None and x.is_floating_point()]
    return floats[0] if floats else torch.get_default_dtype()


def refresh(module: SparseLayer) -> None:
    """Set ``active`` from the vector; call it after the vector was loaded or changed."""
    if module.vector.is_meta or module.sparse_bias is not None:
        module.active = True
    elif module.keep is None:
        module.active = bool((module.vector > 0).any())
    else:
        module.active = module.keep < features(module)[0]
    module.changed()


def make_dense(module: SparseLayer) -> None:
    """Turn a sparse layer back into what it was, in place."""
    delattr(module, module.vector_name)
    del module.sparse_bias
    if not module.kernels:
        drop_codes(module)
    for name in ("selection", "keep", "phase", "active"):
        delattr(module, name)
    weight = module._parameters.get("weight")
    if (
        module.kernels and weight is not None and not weight.is_contiguous()
    ):  # see wina.layers.layout
        weight.data = weight.data.contiguous()
    module.__class__ = module.dense_class  # type: ignore[assignment]


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """Yield name and module of every sparse layer."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            yield name, module
