"""Patterns of a traced decode step that several rewritings look for."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

OPS = torch.ops.wina
ADD = (operator.add, torch.add)
MULTIPLY = (operator.mul, torch.mul)


# Nodes are typed Any below: torch types their arguments as anything.


def rotated(x: Any, members: set[Any]) -> tuple[Any, Any, Any] | None:
    """Return x cos + (-x2, x1) sin, with cos and sin of shape (batch, 1, size), or None.

    ``members`` gets the nodes in between.
    """
    straight = [node for node in x.users if node.target in MULTIPLY]
    total = only_user(straight[0]) if len(straight) == 1 else None
    if total is None or total.target not in ADD or total.args[0] is not straight[0]:
        return None
    crossed = total.args[1]
    if not is_node(crossed) or crossed.target not in MULTIPLY:
        return None
    swapped, sin = crossed.args
    cos = straight[0].args[1]
    if straight[0].args[0] is not x or not is_call(swapped, torch.cat):
        return None
    (parts, *_), axis = swapped.args, swapped.kwargs.get("dim", swapped.args[1:])
    if axis != -1 or len(parts) != 2 or not is_call(parts[0], operator.neg, torch.neg):
        return None
    high, low = parts[0].args[0], parts[1]
    size = x.meta["example_value"].shape[-1]
    halves = (slice(size // 2, None, None), slice(None, size // 2, None))
    for part, half in zip((high, low), halves, strict=True):
        if not is_call(part, operator.getitem) or part.args != (x, (Ellipsis, half)):
            return None
    rows = [_row_of(node, size, x, members) for node in (cos, sin)]
    if any(row is None for row in rows):
        return None
    members.update((straight[0], crossed, swapped, parts[0], high, low, total))
    return total, rows[0], rows[1]


def _row_of(node: Any, size: int, x: Any, members: set[Any]) -> Any:
    """Return what a node unsqueezes at 1, of shape (batch or 1, 1, size) and x's dtype."""
    if not is_call(node, "unsqueeze") or node.args[1:] != (1,):
        return None
    value, like = node.args[0].meta.get("example_value"), x.meta["example_value"]
    if value is None or value.dtype != like.dtype or value.ndim != 3:
        return None
    if value.shape[0] not in (1, like.shape[0]) or value.shape[1:] != (1, size):
        return None
    members.add(node)
    return node.args[0]


def written(state: Any, members: set[Any]) -> tuple[Any, Any] | None:
    """Return the cache into which a state is written at the cache's length, and that length.

    Nothing but attention reads the cache. ``members`` gets the nodes that write and grow it.
    """
    write = only_user(state)
    if write is None or write.target != "index_copy_" or write.users or write.args[1] != 2:
        return None
    cache, _, place, written = write.args
    if written is not state or cache.op != "placeholder" or not is_call(place, *ADD):
        return None
    first, length = place.args
    one = is_call(first, torch.arange) and first.args == (1,)
    if not one or not is_node(length) or length.op != "placeholder":
        return None
    grown = [x for x in length.users if x.target == "add_" and x.args == (length, 1)]
    if len(grown) != 1 or grown[0].users:
        return None
    readers = {"index_copy_", OPS.decode_attention}
    if any(user.target not in readers for user in cache.users) or len(cache.users) != 2:
        return None
    members.update((write, place, first, grown[0]))
    return cache, length


def is_node(node: Any) -> bool:
    """Return whether an argument is a node of the graph."""
    return isinstance(node, Node)


def is_call(node: Any, *targets: Any) -> bool:
    """Return whether an argument is a node that calls one of these."""
    return is_node(node) and node.target in targets


def only_user(node: Any) -> Any:
    """Return the one node that reads a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None
