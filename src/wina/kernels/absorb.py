"""Take a traced model's RMSNorms and residual sums into the sparse operators beside them.

Each kernel of a decode step costs microseconds, whatever it does: a launch, or a call. A norm whose
result only sparse projections read, and a sum whose one side is a sparse projection, cost nothing
inside that projection's own kernel. As in wina.kernels.fusion, it is read off the graph.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

OPS = torch.ops.wina
ADD = (operator.add, torch.add)
MULTIPLY = (operator.mul, torch.mul)


# Nodes are typed Any below: torch types their arguments as anything.


def absorb(module: GraphModule) -> None:
    """Replace in place what wina.kernels.fusion left by the operators with norm and residual."""
    for node in list(module.graph.nodes):  # what the fusion's rewriting left without a reader
        if node.target == "new_empty" and not node.users:
            module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if node.target in (OPS.sparse_linear, OPS.sparse_linear.default):
            _take(node, list(node.args[1:2]), list(node.args[2:3]), node.args[3], single=True)
        elif node.target in (OPS.sparse_linears, OPS.sparse_linears.default):
            _take(node, *node.args[1:4], single=False)
        elif node.target in (OPS.sparse_gated_mlp, OPS.sparse_gated_mlp.default):
            weights, thresholds = list(node.args[1:4]), list(node.args[4:7])
            rest = (node.args[7], node.args[8], OPS.fused_gated_mlp)
            _take_mlp(node, weights, thresholds, *rest)
        elif node.target in (OPS.quantized_linear, OPS.quantized_linear.default):
            arguments = (list(node.args[1]), list(node.args[2:3]), node.args[3])
            _take(node, *arguments, single=True, fused=OPS.quantized_linears)
        elif node.target in (OPS.quantized_linears, OPS.quantized_linears.default):
            _take(node, *node.args[3:6], single=False, fused=OPS.quantized_linears)
        elif node.target in (OPS.quantized_gated_mlp, OPS.quantized_gated_mlp.default):
            weights, thresholds, activation, biases = node.args[3:7]
            _take_mlp(node, weights, thresholds, activation, biases, OPS.quantized_gated_mlp)


def _take(
    node: Any,
    weights: Any,
    thresholds: Any,
    biases: Any,
    *,
    single: bool,
    fused: Any = OPS.fused_linears,
) -> None:
    norm = _norm(node)
    add, residual = _sum(node) if single else (None, None)
    if norm is None and add is None:
        return
    x, weight, epsilon, chain = norm or (node.args[0], None, 0.0, [])
    graph = node.graph
    with graph.inserting_before(node):
        arguments = (x, _list(weight), epsilon, weights, thresholds, biases, _list(residual))
        call = graph.call_function(fused, arguments)
        result = graph.call_function(operator.getitem, (call, 0)) if single else call
    _replace(node, result, add, chain)


def _take_mlp(
    node: Any, weights: Any, thresholds: Any, activation: Any, biases: Any, fused: Any
) -> None:
    norm = _norm(node)
    add, residual = _sum(node)
    x, weight, epsilon, chain = norm or (node.args[0], None, 0.0, [])
    graph = node.graph
    with graph.inserting_before(node):
        arguments = (
            x,
            _list(weight),
            epsilon,
            weights,
            thresholds,
            activation,
            biases,
            _list(residual),
        )
        call = graph.call_function(fused, arguments)
    _replace(node, call, add, chain)


def _replace(node: Any, result: Any, add: Any, chain: list[Any]) -> None:
    result.meta = dict((node if add is None else add).meta)
    if add is not None:
        add.replace_all_uses_with(result)
        node.graph.erase_node(add)
    else:
        node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    for member in chain:
        if not member.users:
            node.graph.erase_node(member)


def _sum(node: Any) -> tuple[Any, Any]:
    """Return the sum that alone reads ``node``, and its other side, known before; or nothing."""
    if len(node.users) != 1:
        return None, None
    add = next(iter(node.users))
    if add.target not in ADD or len(add.args) != 2 or add.kwargs:
        return None, None
    other = add.args[1] if add.args[0] is node else add.args[0]
    if not _is_node(other) or other is node or not _same_shape(other, add):
        return None, None
    for earlier in node.graph.nodes:
        if earlier is other:
            return add, other
        if earlier is node:
            return None, None
    return None, None


def _same_shape(other: Any, add: Any) -> bool:
    a, b = (x.meta.get("example_value") for x in (other, add))
    if a is None or b is None:
        return False
    return bool(a.shape == b.shape and a.dtype == b.dtype)


def _norm(node: Any) -> tuple[Any, Any, float, list[Any]] | None:
    """Return x, weight, epsilon and the nodes of the RMSNorm that alone feeds ``node``.

    The form is weight * (x32 * rsqrt(mean(x32^2) + epsilon)).to(dtype), with x32 = x in float32.
    """
    scaled = node.args[0]
    if not _is_node(scaled) or len(scaled.users) != 1 or scaled.target not in MULTIPLY:
        return None
    for weight, cast in (scaled.args, scaled.args[::-1]):
        found = _normed(cast)
        if found is None or not _is_node(weight):
            continue
        value = weight.meta.get("example_value")
        x = found[0].meta.get("example_value")
        if value is None or x is None or value.ndim != 1 or value.dtype != x.dtype:
            continue
        return found[0], weight, found[1], [scaled, *found[2]]
    return None


def _normed(cast: Any) -> tuple[Any, float, list[Any]] | None:
    if not _method(cast, "to") or len(cast.users) != 1:
        return None
    product = cast.args[0]
    if not _is_node(product) or product.target not in MULTIPLY:
        return None
    for wide, root in (product.args, product.args[::-1]):
        if not _is_node(root) or root.target is not torch.rsqrt:
            continue
        total = root.args[0]
        if not _is_node(total) or total.target not in ADD:
            continue
        mean, epsilon = total.args
        square = mean.args[0] if _method(mean, "mean") else None
        if square is None or not _method(square, "pow") or square.args != (wide, 2):
            continue
        if mean.args[1:] != (-1,) or mean.kwargs != {"keepdim": True}:
            continue
        if not isinstance(epsilon, float) or not _method(wide, "to"):
            continue
        x, dtype = wide.args[0], wide.args[1:]
        before, after = (node.meta.get("example_value") for node in (x, cast))
        if dtype != (torch.float32,) or before is None or after is None:
            continue
        if before.dtype != after.dtype:
            continue
        return x, epsilon, [cast, product, root, total, mean, square, wide]
    return None


def _method(node: Any, name: str) -> bool:
    return _is_node(node) and node.op == "call_method" and node.target == name


def _is_node(node: Any) -> bool:
    return isinstance(node, Node)


def _list(node: Any) -> list[Any]:
    return [] if node is None else [node]
