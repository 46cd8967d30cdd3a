"""The layout of weights in memory that decoding wants: input-major.

A kernel that skips dropped channels reads W by input channel, so a channel's weights should lie
together. The shape, name and values of a weight stay; only its strides change, and weights are in
memory once. Making the model dense again restores the usual layout.
"""

from __future__ import annotations

import torch
from torch import nn

from wina.kernels import available_backends
from wina.kernels.cpu import ensure_crossover
from wina.kernels.cpu.library import Arena, input_major
from wina.layers.experts import SparseExpertLinear, store_input_major
from wina.layers.foreign import device_of
from wina.layers.linear import RowsLinear, SparseLayer, matrix, sparse_layers
from wina.layers.masked import MaskedLayer, pack_head, pack_layer
from wina.layers.quantized import packed


def lay_out_for_decode(model: nn.Module) -> None:
    """Store the sparse layers' weights input-major, in place, where a kernel gains by it.

    That is where compiled kernels run: on the CPU, or on a GPU. One layer's weight is copied at a
    time. A dense head on the CPU decodes with wina's kernel too, in its own layout. Of layers and
    heads that another library quantized, codes and scales are copied: prompts go through the
    library's own weights.

    Args:
        model: sparse.
    """
    backends = available_backends()
    devices = {"cpu"} & set(backends)
    if "cuda" in backends or "triton" in backends:
        devices.add("cuda")
    if not devices:
        return
    arena = Arena()
    for _, layer in sparse_layers(model):
        if isinstance(layer, MaskedLayer) and layer.keep is None:
            if layer.vector.device.type in devices:
                pack_layer(layer, arena)
            continue
        runnable = layer.kernels and layer.active and layer.keep is None and not packed(layer)
        if runnable and matrix(layer).device.type in devices:
            _store(layer, arena)
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if isinstance(head, nn.Module) and device_of(head).type in devices:
        pack_head(head, arena)
    if "cpu" not in devices:
        return
    if type(head) is nn.Linear and head.weight.device.type == "cpu":
        head.__class__ = RowsLinear  # its weight stays as it is: it may be the embeddings' too


def measure_batches(model: nn.Module) -> None:
    """Find, once for this machine, up to which batch each shape of layer gains by skipping.

    Only weights that ``lay_out_for_decode`` stored have the choice; a second or so a shape.
    """
    if "cpu" not in available_backends():
        return
    shapes: dict[torch.dtype, set[tuple[int, int]]] = {}
    for _, layer in sparse_layers(model):
        if layer.kernels and layer.active and layer.keep is None:
            weight = matrix(layer)
            if weight.device.type == "cpu" and weight.stride(0) == 1:
                shapes.setdefault(weight.dtype, set()).add((weight.shape[1], weight.shape[0]))
    for dtype, found in shapes.items():
        ensure_crossover(sorted(found), dtype)


def _store(layer: SparseLayer, arena: Arena) -> None:
    if isinstance(layer, SparseExpertLinear):
        store_input_major(layer.owner)
        return
    weight = layer.get_parameter("weight")
    if matrix(layer).stride(0) != 1:
        weight.data = input_major(weight.data, arena)
