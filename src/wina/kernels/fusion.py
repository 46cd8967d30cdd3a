"""Fuse the operators of a traced model: projections of one input, and gated MLPs, into one call.

It works on the graph that torch.compile traced, so a model's structure is read off what it
computes, and no module or family is named: operators that share an input become one
``sparse_linears``, and down(act(gate(x)) * up(x)) becomes ``sparse_gated_mlp`` (or those of
quantized weights). On the CPU dense
linears of a few rows (the head) become ``dense_linear``; norms before and residuals after the
sparse operators move into them (wina.kernels.absorb); on a GPU attention takes its rotary embedding
and the write of its cache (wina.kernels.attend). The fused
operators compute the same sums in the same order; only the activation is the kernel's own, equal
to torch's to the last bits of a float32.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wina.kernels.absorb import absorb
from wina.kernels.attend import attend
from wina.kernels.backends import available_backends, serves
from wina.kernels.dense import use_dense
from wina.kernels.processor import multiplies

OPS = torch.ops.wina
LINEAR, QUANTIZED = OPS.sparse_linear, OPS.quantized_linear
ADD = {operator.add, torch.add}
DENSE = {functional.linear, torch._C._nn.linear}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = 4  # rows
MULTIPLY = {operator.mul, torch.mul, "mul"}


def fuse(module: GraphModule) -> GraphModule:
    """Fuse in place what can be fused in a graph of torch functions; return it."""
    for node in list(module.graph.nodes):
        if _is_sparse(node):
            _fuse_mlp(node)
    for node in list(module.graph.nodes):
        if node.target in DENSE:
            _use_rows_kernel(node)
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    groups: dict[Any, list[Any]] = {}
    for node in order:
        if _is_sparse(node):
            groups.setdefault((node.args[0], is_quantized(node)), []).append(node)
    for group in groups.values():
        _fuse_group(group, order)
    if _has_fused(module):
        use_dense(module)
        absorb(module)
    if _on_gpu(module) and serves("cuda"):
        attend(module)
    module.graph.lint()
    module.recompile()
    return module


# Nodes are typed Any below: torch types their arguments as anything.


def _is_node(node: Any) -> bool:
    return isinstance(node, Node)


def _is_sparse(node: Any) -> bool:
    kinds = (LINEAR, LINEAR.default, QUANTIZED, QUANTIZED.default)
    return _is_node(node) and node.target in kinds


def is_quantized(node: Any) -> bool:
    """Return whether a sparse linear's weight is quantized: three tensors, not one."""
    return node.target in (QUANTIZED, QUANTIZED.default)


def _use_rows_kernel(node: Any) -> None:
    """Compute a dense linear of a few rows on the CPU by wina's kernel, at memory's speed.

    Of more rows, too, where torch is slow.
    """
    x = node.args[0].meta.get("example_value") if _is_node(node.args[0]) else None
    if x is None or node.kwargs or x.device.type != "cpu" or x.dtype not in DTYPES:
        return
    if "cpu" not in available_backends():
        return
    if x.numel() > FEW * x.shape[-1] and multiplies(x.dtype):
        return
    x, weight, *bias = node.args
    if is_traceable_wrapper_subclass(weight.meta.get("example_value")):
        return  # another library's weight, which only that can multiply with
    with node.graph.inserting_before(node):
        packed = [] if not bias or bias[0] is None else [bias[0]]
        arguments = (x, weight, packed)
        call = node.graph.call_function(torch.ops.wina.dense_linear, arguments)
        node.replace_all_uses_with(call)
    _erase(node)


def _has_fused(module: GraphModule) -> bool:
    """Return whether norms and residuals may move into the sparse operators' own kernels."""
    if _on_gpu(module):
        return True
    return "cpu" in available_backends() and all(x.dtype != torch.float64 for x in _tensors(module))


def _on_gpu(module: GraphModule) -> bool:
    return any(x.device.type == "cuda" for x in _tensors(module))


def _tensors(module: GraphModule) -> list[torch.Tensor]:
    values = [node.meta.get("example_value") for node in module.graph.nodes]
    return [x for x in values if isinstance(x, torch.Tensor)]


def _fuse_group(group: list[Any], order: dict[Any, int]) -> None:
    first = group[0]
    # The call moves to the first one's place, where the others' weights must be known.
    group = [x for x in group if all(_hoisted(y, first, order) for y in x.all_input_nodes)]
    if len(group) < 2:
        return
    x, graph = first.args[0], first.graph
    with graph.inserting_before(first):
        weights, thresholds = ([node.args[i] for node in group] for i in (1, 2))
        biases = _packed_biases(group)
        if is_quantized(first):
            flat = [*chain(*weights)]
            call = graph.call_function(
                OPS.quantized_linears, (x, [], 0.0, flat, thresholds, biases, [])
            )
        else:
            call = graph.call_function(OPS.sparse_linears, (x, weights, thresholds, biases))
        for index, node in enumerate(group):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (call, index)))
    _erase(*group)


def _hoisted(node: Any, first: Any, order: dict[Any, int]) -> bool:
    """Return whether a node's value is known before ``first``; move a sum of biases there."""
    if order[node] < order[first]:
        return True
    if node.target not in ADD or any(order[x] >= order[first] for x in node.all_input_nodes):
        return False
    first.prepend(node)
    return True


def _fuse_mlp(down: Any) -> None:
    product = down.args[0]
    found = _gate_and_up(product)
    if found is None:
        return
    activated, up, activation = found
    gate = activated.args[0]
    projections = (gate, up, down)
    if gate.args[0] is not up.args[0] or len({is_quantized(x) for x in projections}) > 1:
        return
    graph = down.graph
    with graph.inserting_before(down):
        weights, thresholds = ([node.args[i] for node in projections] for i in (1, 2))
        biases = _packed_biases(projections)
        x = gate.args[0]
        if is_quantized(down):
            flat = [*chain(*weights)]
            call = graph.call_function(
                OPS.quantized_gated_mlp, (x, [], 0.0, flat, thresholds, activation, biases, [])
            )
        else:
            arguments = (x, *weights, *thresholds, activation, biases)
            call = graph.call_function(OPS.sparse_gated_mlp, arguments)
        down.replace_all_uses_with(call)
    _erase(down, product, activated, gate, up)


def _gate_and_up(product: Any) -> tuple[Any, Any, str] | None:
    """Return act(gate), up and the activation's name if a node is their product, used once."""
    if not _is_node(product) or product.target not in MULTIPLY or len(product.args) != 2:
        return None
    for activated, up in (product.args, product.args[::-1]):
        name = _activation(activated)
        if name is not None and _is_sparse(up) and _is_sparse(activated.args[0]):
            gate = activated.args[0]
            if all(len(node.users) == 1 for node in (product, activated, gate, up)):
                return activated, up, name
    return None


def _activation(node: Any) -> str | None:
    if not _is_node(node) or len(node.args) != 1:
        return None
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if node.target in (functional.gelu, torch._C._nn.gelu):
        kind = options.pop("approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(kind)) if not options else None
    known: dict[Any, str] = {
        functional.silu: "silu",
        functional.relu: "relu",
        torch.relu: "relu",
    }
    return known.get(node.target) if not options else None


def _packed_biases(projections: Sequence[Any]) -> list[Any]:
    """Return the biases as the operators take them; insert the empty one that means none."""
    biases = [(node.args[3] or [None])[0] for node in projections]
    if all(bias is None for bias in biases):
        return []
    first = projections[0]
    empty = first.graph.call_method("new_empty", (first.args[0], 0))
    return [empty if bias is None else bias for bias in biases]


def _erase(*nodes: Any) -> None:
    # Not eliminate_dead_code, which takes what a step writes in place for dead.
    for node in nodes:
        node.graph.erase_node(node)
