"""Sparse linear layers in vLLM whose weights compressed-tensors has quantized.

vLLM's own method of compressed-tensors creates a layer's parameters, loads them and computes dense
rows, as without wina. Beside its packed weights a layer that drops something has the same codes
input-major, for sparse rows. Where those are many (on a GPU), vLLM's product computes them too:
rows masked for each projection go through the whole layer at once, one below the other, since it
reads the weights once for some rows more, and of each the projection's own outputs are taken.

``torch.ops.wina.batch_quantized`` is the layer as one opaque operator, as ``ops.batch_linear``. It
finds the weights by the layer's thresholds: with names instead of tensors each layer's graph would
be another one to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)
from vllm.platforms import current_platform

from wina.errors import UsageError, WinaError
from wina.integrations.vllm.compressed import BITS, METHOD, projections
from wina.integrations.vllm.linear import Planned
from wina.integrations.vllm.ops import _join, _sum, by_rows, gate
from wina.integrations.vllm.rows import BATCH
from wina.kernels import QuantizedWeight, available_backends, drop_each
from wina.kernels.gpu import flagged_quantized_linears

SCHEMA = "(Tensor x, Tensor thresholds, int[] sizes, Tensor[] bias, Tensor[] sparse_bias) -> Tensor"
# Rows up to which a GPU skips codes of dropped channels. The kernel takes a row at a time, so that
# rows share no reading of codes, as they do in vLLM's product: at 50 % two rows read as much.
FEW = 2
TOGETHER = 128  # rows up to which vLLM's product takes those of all masks at once


class Held:
    """The weights of one layer.

    Attributes:
        product: x W' of the whole layer as vLLM computes it.
        sizes: outputs of each projection.
        weights: of each projection, for the kernels; None where they do not run.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        sizes: list[int],
        weights: list[QuantizedWeight] | None,
    ) -> None:
        self.product = product
        self.sizes = sizes
        self.weights = weights
        self.flat = [tensor for weight in weights or () for tensor in weight]

    def dense(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + b, shape (rows, outputs)."""
        return _join([self.product(x)], bias)

    def masked(self, each: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + b with an x of its own for each projection, (projections, rows, inputs)."""
        count, rows = each.shape[:2]
        if rows * count <= TOGETHER:
            whole = self.product(each.flatten(0, 1)).view(count, rows, -1).unbind()
        else:
            whole = tuple(self.product(x) for x in each)
        own = [torch.split(one, self.sizes, -1)[place] for place, one in enumerate(whole)]
        return _join(own, bias)

    def sparse(self, x: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
        """Return W drop(x) + b, shape (rows, outputs).

        On a CPU the kernel is faster than vLLM's product for any number of rows at 50 %.
        """
        if self.weights is None or (x.is_cuda and len(x) > FEW):
            return self.masked(drop_each(x, thresholds), bias)
        biases = [] if bias is None else list(torch.split(bias, self.sizes))
        vectors = list(thresholds.unbind())
        found = torch.ops.wina.quantized_linears(x, [], 0.0, self.flat, vectors, biases, [])
        return _join(found, None)


_HELD: WeakValueDictionary[int, Held] = WeakValueDictionary()  # by where the thresholds lie


@register_weight_loader_v2_supported_method
class WinaQuantizedLinearMethod(Planned, LinearMethodBase):  # type: ignore[misc]
    """Computes a layer of which the plan names at least one projection; see ``Planned``.

    Args:
        config: of wina.
        names: of the projections, in their order.
        base: vLLM's method of compressed-tensors for this layer.
    """

    def __init__(self, config: Any, names: list[str], base: Any) -> None:
        super().__init__(config, names)
        self.base = base

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create compressed-tensors' parameters, and what the plan adds.

        Raises:
            UsageError: vLLM does not compute such weights in the model's dtype.
            WinaError: the plan does not fit the layer.
        """
        if current_platform.is_cpu() and params_dtype == torch.float32:
            raise UsageError(
                "vLLM computes with packed weights on a CPU in 16 bits alone: --dtype bfloat16"
            )
        sizes = (input_size_per_partition, output_partition_sizes, input_size)
        rest = (output_size, params_dtype)
        self.base.create_weights(layer, *sizes, *rest, **extra_weight_attrs)
        self.add_vectors(layer, *sizes, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring in the plan, and store the weights as vLLM's and wina's kernels want them.

        Raises:
            WinaError: the checkpoint lacks vectors, or no layer holds some linear of the plan.
        """
        self.load_vectors(layer)
        if not layer.wina_active:
            self.base.process_weights_after_loading(layer)
            return
        device = layer.weight_packed.device
        if device.type != "cpu":
            BATCH.prepare(device)
        weights = None
        if device.type in available_backends():
            weights = projections(
                layer.weight_packed,
                layer.weight_scale.data,
                getattr(layer, "weight_zero_point", None),
                layer.input_size_per_partition,
                layer.wina_sizes,
                layer.scheme.quant_type.size_bits,
            )
        # Marlin reorders a bias for its own product, which is asked to add none.
        bias, layer.bias = layer.bias, None
        self.base.process_weights_after_loading(layer)
        layer.bias = bias
        for place, weight in enumerate(weights or ()):
            for name, tensor in zip(weight._fields, weight, strict=True):
                layer.register_buffer(f"wina_{name}{place}", tensor, persistent=False)
        product = partial(layer.scheme.apply_weights, layer, bias=None)
        layer.wina_held = Held(product, layer.wina_sizes, weights)
        _HELD[layer.thresholds.data_ptr()] = layer.wina_held

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's outputs on this rank, shape (..., outputs)."""
        if not layer.wina_active:
            dense: Tensor = self.base.apply(layer, x, bias)
            return dense
        extra = getattr(layer, "sparse_bias", None) if layer.wina_bias else None
        flat = x.reshape(-1, x.shape[-1])
        y = batch_quantized(flat, layer.thresholds, layer.wina_sizes, bias, extra)
        return y.view(*x.shape[:-1], y.shape[-1])


def method_for(config: Any, layer: Any, names: list[str], prefix: str) -> Any:
    """Return how vLLM computes a planned layer of a model that compressed-tensors has quantized.

    None for a layer that it left as it was.

    Raises:
        UsageError: the layer's format is none that wina runs.
    """
    base = config.base.get_quant_method(layer, prefix)
    if isinstance(base, UnquantizedLinearMethod):
        return None
    scheme = getattr(layer, "scheme", None)
    plain = type(base) is compressed_tensors.CompressedTensorsLinearMethod
    if not plain or not isinstance(scheme, CompressedTensorsWNA16):
        raise UsageError(
            f"{METHOD} keeps {prefix} as {type(scheme).__name__}, which wina does not run in vLLM; "
            "it runs codes of 4 or 8 bits whose inputs are not quantized (W4A16, W8A16)"
        )
    if scheme.quant_type.size_bits not in BITS or getattr(scheme, "has_g_idx", False):
        raise UsageError(
            f"wina runs codes of 4 or 8 bits in groups of consecutive inputs in vLLM; {prefix} has "
            f"{scheme.quant_type.size_bits} bits, or groups by activation order"
        )
    return WinaQuantizedLinearMethod(config, names, base)


def batch_quantized(
    x: Tensor,
    thresholds: Tensor,
    sizes: list[int],
    bias: Tensor | None,
    sparse_bias: Tensor | None,
) -> Tensor:
    """Return the layer's outputs, shape (rows, outputs).

    Args:
        x: shape (rows, inputs).
        thresholds: of each projection, shape (projections, inputs), float32; the layer's own.
        sizes: outputs of each projection.
        bias: shape (outputs,), or None.
        sparse_bias: added on sparse rows only, shape (outputs,), or None.

    Raises:
        WinaError: the thresholds are no layer's, or were moved since.
    """
    biases = [] if bias is None else [bias]
    others = [] if sparse_bias is None else [sparse_bias]
    result: Tensor = torch.ops.wina.batch_quantized(x, thresholds, sizes, biases, others)
    return result


def _on_cpu(
    x: Tensor, thresholds: Tensor, sizes: list[int], bias: list[Tensor], sparse_bias: list[Tensor]
) -> Tensor:
    del sizes
    return _by_rows(_held(thresholds), x, thresholds, bias, sparse_bias)


def _by_rows(
    held: Held, x: Tensor, thresholds: Tensor, bias: list[Tensor], sparse_bias: list[Tensor]
) -> Tensor:
    own, extra = bias[0] if bias else None, sparse_bias[0] if sparse_bias else None
    return by_rows(
        x,
        sum(held.sizes),
        lambda rows: held.dense(rows, own),
        lambda rows: held.sparse(rows, thresholds, _sum(own, extra)),
    )


def _on_cuda(
    x: Tensor, thresholds: Tensor, sizes: list[int], bias: list[Tensor], sparse_bias: list[Tensor]
) -> Tensor:
    held = _held(thresholds)
    if not torch.cuda.is_current_stream_capturing():
        return _by_rows(held, x, thresholds, bias, sparse_bias)
    # A graph is replayed with any mix of rows: the device looks which are which.
    own = bias[0] if bias else None
    extra = sparse_bias[0] if sparse_bias else None
    flags = BATCH.flags(x.device, len(x))
    if held.weights is not None and len(x) <= FEW:
        none: list[Tensor | None] = [None] * len(sizes)
        biases = none if own is None else torch.split(own, sizes)
        extras = none if extra is None else torch.split(extra, sizes)
        each = (held.weights, thresholds.unbind(), biases)
        found = flagged_quantized_linears(x, *each, flags, extras)
        if found is not None:
            return found
    result = held.masked(gate(x, thresholds, flags), own)
    return result if extra is None else result + flags[:, None] * extra


def _held(thresholds: Tensor) -> Held:
    found = _HELD.get(thresholds.data_ptr())
    if found is None:
        raise WinaError(
            "a layer's thresholds are not where they were when its weights were laid out; wina "
            "does not run quantized weights with vLLM's offloading of weights"
        )
    return found


def _fake(
    x: Tensor, thresholds: Tensor, sizes: list[int], bias: list[Tensor], sparse_bias: list[Tensor]
) -> Tensor:
    del thresholds, bias, sparse_bias
    return x.new_empty(x.shape[0], sum(sizes))


def _define() -> None:
    name = "wina::batch_quantized"
    torch.library.define(name, SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CPU", _on_cpu)
    torch.library.impl(name, "CUDA", _on_cuda)
    torch.library.register_fake(name, _fake)


_define()
