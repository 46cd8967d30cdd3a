"""vLLM's packed weights on a CPU, kept beside the input-major ones on request.

A kernel that skips rows wants W input-major; a dense product is faster on weights that oneDNN has
packed for itself. One copy of the weights serves few rows best, or many, not both. With
``--additional-config '{"wina": {"dense_copy": true}}'`` there are two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
_products: dict[int, list[Product]] = {}  # by where the input-major weight lies


def pack(projections: list[Tensor]) -> list[Product]:
    """Return x W' for each W of shape (outputs, inputs), as vLLM computes it on a CPU."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    found: list[Product] = []
    for weight in projections:
        layer = SimpleNamespace(weight=nn.Parameter(weight.contiguous(), requires_grad=False))
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        product, left = layer.cpu_linear, layer.weight
        found.append(partial(_apply, product, left))
    return found


def _apply(product: Callable[..., Tensor], left: Tensor, x: Tensor) -> Tensor:
    return product(x, left, None)


def remember(weight: Tensor, products: list[Product]) -> None:
    """Let ``products_of`` find them by the input-major weight, which stays where it is."""
    _products[weight.data_ptr()] = products


def any_products() -> bool:
    """Return whether any weight has a copy."""
    return bool(_products)


def products_of(weight: Tensor) -> list[Product] | None:
    """Return the products of a weight's projections; None if there is no copy."""
    return _products.get(weight.data_ptr())
