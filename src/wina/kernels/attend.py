"""Take a traced step's rotary embedding and the write of its static cache into attention.

Around each layer's attention stand a few kernels of a microsecond or two: the rotation of query
and key, the writes of key and value, the counting of positions. Where they have the form that
most models share (rotation over halves, wholly or of a head's first part), one operator does it
all. As in wina.kernels.fusion, it is read off the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from wina.kernels.cuda.attention import attends
from wina.kernels.patterns import ADD, MULTIPLY, OPS, is_call, is_node, rotated, written

# Nodes are typed Any below: torch types their arguments as anything.


def attend(module: GraphModule, fits: Callable[..., bool] = attends) -> None:
    """Replace in place each attention and what prepares it by ``attention_step``.

    Args:
        module: traced by torch.compile.
        fits: whether the operator should serve a query, cache, mask and number of rotated features.
    """
    graph = module.graph
    order = {node: place for place, node in enumerate(graph.nodes)}
    lengths, shared = [], dict[Any, Any]()  # shared: what all layers read, made once
    for node in list(graph.nodes):
        members: set[Any] = set()
        arguments = _arguments(node, members, order)
        if arguments is None or not fits(*_values(arguments)):
            continue
        arguments[3:5] = _kept(arguments[3], arguments[4], shared)
        arguments[8] = _copied(arguments[8], shared)
        with graph.inserting_before(node):
            call = graph.call_function(OPS.attention_step, tuple(arguments))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        for member in sorted(members, key=order.__getitem__, reverse=True):
            if not member.users:
                graph.erase_node(member)
        lengths.append(arguments[7])
    if lengths:  # all of them by one kernel, after the layers that read them
        with graph.inserting_before(graph.output_node()):
            graph.call_function(torch._foreach_add_, (lengths, 1))


def _kept(cos: Any, sin: Any, known: dict[Any, Any]) -> list[Any]:
    """Return cos and sin made once for all layers: the compiler would compute them for each."""
    if (cos, sin) not in known:
        graph = cos.graph
        order = {node: place for place, node in enumerate(graph.nodes)}
        with graph.inserting_after(max(cos, sin, key=order.__getitem__)):
            both = graph.call_function(OPS.both, (cos, sin))
        with graph.inserting_after(both):
            known[cos, sin] = [graph.call_function(operator.getitem, (both, i)) for i in (0, 1)]
    return list(known[cos, sin])


def _copied(mask: Any, known: dict[Any, Any]) -> Any:
    """Return the mask, made once for all layers."""
    if mask not in known:
        with mask.graph.inserting_after(mask):
            known[mask] = mask.graph.call_function(OPS.kept, (mask,))
    return known[mask]


def _values(arguments: list[Any]) -> tuple[Any, ...]:
    query, cos, key, value, mask = (arguments[i].meta["example_value"] for i in (0, 3, 5, 6, 8))
    return query, key, value, mask, cos.shape[-1]


def _arguments(node: Any, members: set[Any], order: dict[Any, int]) -> list[Any] | None:
    """Return an attention's arguments of ``attention_step``, or None; note what it replaces."""
    if not is_call(node, OPS.decode_attention, OPS.decode_attention.default):
        return None
    turned, keys, values, mask, scale = node.args
    writes = [_write(cache) for cache in (keys, values)]
    if any(write is None for write in writes):
        return None
    query, key = _heads(turned, members), _heads(writes[0], members)
    caches = [written(state, members) for state in writes]
    if query is None or key is None or query[1:] != key[1:] or caches[0] is None:
        return None
    if caches != [(keys, caches[0][1]), (values, caches[0][1])]:
        return None
    length = caches[0][1]
    members.add(node)
    grown = next(x for x in members if x.target == "add_")
    # It will grow at the end of the step instead.
    if any(order[user] > order[grown] and user not in members for user in length.users):
        return None
    return [query[0], key[0], writes[1], *query[1:], keys, values, length, mask, scale]


def _write(cache: Any) -> Any:
    """Return what is written into a cache, or None."""
    found = [x.args[3] for x in cache.users if x.target == "index_copy_" and len(x.args) == 4]
    return found[0] if len(found) == 1 and is_node(found[0]) else None


def _heads(turned: Any, members: set[Any]) -> tuple[Any, Any, Any] | None:
    """Return the heads of which a node is the rotation, and its cos and sin, or None."""
    total, rest = turned, None
    if is_call(turned, torch.cat):
        (parts, *_), axis = turned.args, turned.kwargs.get("dim", turned.args[1:])
        if axis != -1 or len(parts) != 2:
            return None
        total, rest = parts
    if not is_call(total, *ADD) or not is_call(total.args[0], *MULTIPLY):
        return None
    x = total.args[0].args[0]
    found = rotated(x, members) if is_node(x) else None
    if found is None or found[0] is not total:
        return None
    if rest is None:
        return x, *found[1:]
    size = x.meta["example_value"].shape[-1]
    both = ((x, slice(None, size, None)), (rest, slice(size, None, None)))
    if not all(is_call(part, operator.getitem) for part, _ in both):
        return None
    if any(part.args != (x.args[0], (Ellipsis, some)) for part, some in both):
        return None
    members.update((turned, x, rest))
    return x.args[0], *found[1:]
