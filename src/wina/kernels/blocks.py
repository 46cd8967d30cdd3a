"""Find a traced step's decoder blocks and run each unbroken row of them in one call, on the CPU.

A small model's step is hundreds of microsecond kernels, and between them the weights that stream
past push whatever called the last one out of the cache: Python, torch's dispatcher and the glue
that the compiler writes then take as long as the kernels. Here a block as most models have it
(RMSNorm, q, k, v, rotary embedding, a static cache, attention, o, RMSNorm, gated MLP, two residual
sums) is read off the graph that wina.kernels.fusion left, its tensors are handed to the compiled
library once, and what remains for the step is one operator. Any other block stays as it is.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from wina.kernels.backends import available_backends
from wina.kernels.cpu import library
from wina.kernels.patterns import ADD, is_node, only_user, rotated, written

OPS = torch.ops.wina
LINEARS = (OPS.fused_linears, OPS.quantized_linears)
MLPS = (OPS.fused_gated_mlp, OPS.quantized_gated_mlp)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_numbers = itertools.count(1)


# Nodes are typed Any below: torch types their arguments as anything.


@dataclass
class _Block:
    """A block's nodes.

    Attributes:
        x: what it reads.
        shared: cos, sin and mask, which a row of blocks has in common.
        arguments: of the operator ``add_block`` behind the number.
        members: all of its nodes, in the order of the graph.
        last: its result, one of them.
    """

    x: Any
    shared: tuple[Any, Any, Any]
    arguments: list[Any]
    members: set[Any]
    last: Any


def run_blocks(
    module: GraphModule, inputs: Sequence[Any]
) -> tuple[GraphModule, list[int], list[int]]:
    """Return a graph whose blocks are run whole by the compiled library, where it can.

    Args:
        module: traced by torch.compile, after wina.kernels.fusion.fuse.
        inputs: the tensors that will be given to it each time, always the same ones: some of them
            go to the library for good and are no longer asked for.

    Returns:
        The graph, which of the inputs it reads, and the numbers of the rows of blocks, for
        ``release``.
    """
    everything = list(range(len(inputs)))
    if "cpu" not in available_backends():
        return module, everything, []
    if not all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in inputs):
        return module, everything, []
    module = _copy(module)  # torch.compile still looks at its own
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    known = dict(zip(places, inputs, strict=True))
    numbers = [_run(module, row, known) for row in _rows(module)]
    if not numbers:
        return module, everything, []
    kept = [i for i, node in enumerate(places) if node.users]
    for node in places:
        if not node.users:
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module, kept, numbers


def release(owner: Callable[..., object], numbers: Sequence[int]) -> None:
    """Let the library forget rows of blocks when ``owner`` is gone."""
    for number in numbers:
        weakref.finalize(owner, library.free_blocks, number)


def _copy(module: GraphModule) -> GraphModule:
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)


def _rows(module: GraphModule) -> list[list[_Block]]:
    """Return the rows of blocks of which each reads the one before it."""
    rows: list[list[_Block]] = []
    for node in module.graph.nodes:
        block = _block(node)
        if block is None:
            continue
        if rows and _follows(block, rows[-1][-1]):
            rows[-1].append(block)
        else:
            rows.append([block])
    return [row for row in rows if _alone(row)]


def _follows(block: _Block, before: _Block) -> bool:
    """Return whether a block reads the one before it, which nothing else does."""
    same = before.last is block.x and before.shared == block.shared
    return same and set(before.last.users) <= block.members


def _alone(row: list[_Block]) -> bool:
    """Return whether nothing else reads what lies inside a row, nor its lengths after it."""
    members = {node for block in row for node in block.members}
    inner = members - {row[-1].last}
    if any(user not in members for node in inner for user in node.users):
        return False
    order = {node: place for place, node in enumerate(row[0].x.graph.nodes)}
    end = order[row[-1].last]
    lengths = [block.arguments[5][2] for block in row]
    # What else reads a length does it before the row runs: the row needs it for cos, sin, mask.
    needed = _ancestors([row[0].x, *row[0].shared])
    return all(
        user in members or (order[user] < end and user in needed)
        for length in lengths
        for user in length.users
    )


def _ancestors(nodes: list[Any]) -> set[Any]:
    found: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node not in found:
            found.add(node)
            nodes.extend(node.all_input_nodes)
    return found


def _run(module: GraphModule, row: list[_Block], known: dict[Any, Any]) -> int:
    number = next(_numbers)
    for block in row:
        OPS.add_block(number, *torch.fx.node.map_arg(block.arguments, lambda x: _value(x, known)))
    last, graph = row[-1].last, module.graph
    with graph.inserting_before(last):
        call = graph.call_function(OPS.decode_blocks, (row[0].x, *row[0].shared, number))
    call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    members = {node for block in row for node in block.members}
    for node in reversed(list(graph.nodes)):
        if node in members:
            graph.erase_node(node)
    return number


def _value(node: Any, known: dict[Any, Any]) -> Any:
    """Return what a node that ``_is_fixed`` will always be."""
    if node in known:
        return known[node].detach()
    if node.target in ADD:
        return _value(node.args[0], known) + _value(node.args[1], known)
    return torch.empty(0, dtype=node.meta["dtype"])


def _is_fixed(node: Any, members: set[Any], dtype: torch.dtype) -> bool:
    """Return whether a node is an input, a sum of two (biases) or no bias; note the latter two."""
    if node.op == "placeholder":
        return True
    if node.target in ADD and not node.kwargs:
        fixed = all(is_node(x) and x.op == "placeholder" for x in node.args)
    else:
        fixed = node.target == "new_empty" and tuple(node.args[1:]) == (0,)
        node.meta["dtype"] = dtype
    members.add(node)
    return fixed


# --- matching ---


def _block(qkv: Any) -> _Block | None:
    """Return the block that begins with a node, or None."""
    if qkv.target not in LINEARS or len(qkv.args[4]) != 3:
        return None
    x, norm, epsilon, weights, thresholds, biases, residual = qkv.args
    like = x.meta.get("example_value") if is_node(x) else None
    if len(norm) != 1 or residual or like is None or like.dtype not in DTYPES:
        return None
    if like.ndim != 3 or like.shape[1] != 1:
        return None
    members = {qkv}
    heads = [_heads(qkv, index, members) for index in range(3)]
    if any(one is None for one in heads):
        return None
    q, k = (rotated(one, members) for one in heads[:2])
    if q is None or k is None or q[1:] != k[1:]:
        return None
    keys, values = written(k[0], members), written(heads[2], members)
    if keys is None or values is None or keys[1] is not values[1]:
        return None
    attention = only_user(q[0])
    if attention is None or attention.target != OPS.decode_attention:
        return None
    if attention.args[:3] != (q[0], keys[0], values[0]):
        return None
    members.add(attention)
    out = _mixed(attention, members)
    if out is None or out.target not in LINEARS or len(out.args[4]) != 1:
        return None
    if out.args[1] or list(out.args[6]) != [x]:
        return None
    members.add(out)
    y = only_user(out)
    if y is None or y.target is not operator.getitem or y.args[1] != 0:
        return None
    members.add(y)
    mlp = only_user(y)
    if mlp is None or mlp.target not in MLPS:
        return None
    if mlp.args[0] is not y or len(mlp.args[1]) != 1 or list(mlp.args[7]) != [y]:
        return None
    members.add(mlp)
    _, mlp_norm, mlp_epsilon, mlp_weights, mlp_thresholds, activation, mlp_biases, _ = mlp.args
    arguments = [
        *(norm, epsilon, weights, thresholds, biases),
        [keys[0], values[0], keys[1]],
        float(attention.args[4]),
        *(out.args[3], out.args[4], out.args[5]),
        *(mlp_norm, mlp_epsilon, mlp_weights, mlp_thresholds, activation, mlp_biases),
    ]
    fixed = [node for one in arguments if isinstance(one, (list, tuple)) for node in one]
    if not all(_is_fixed(node, members, like.dtype) for node in fixed):
        return None
    return _Block(x, (q[1], q[2], attention.args[3]), arguments, members, mlp)


def _heads(qkv: Any, index: int, members: set[Any]) -> Any:
    """Return a projection as (batch, heads, 1, size), or None."""
    found = [x for x in qkv.users if x.target is operator.getitem and x.args[1] == index]
    view = only_user(found[0]) if len(found) == 1 else None
    if view is None or view.target != "view":
        return None
    turned = only_user(view)
    if turned is None or turned.target != "transpose" or turned.args[1:] != (1, 2):
        return None
    members.update((found[0], view, turned))
    return turned


def _mixed(attention: Any, members: set[Any]) -> Any:
    """Return what reads the heads side by side, or None."""
    node = attention
    for names in (("transpose",), ("reshape", "view"), ("contiguous",)):
        following = only_user(node)
        if following is None:
            return None
        if following.target in names:
            members.add(following)
            node = following
        elif names != ("contiguous",):
            return None
    return only_user(node)
