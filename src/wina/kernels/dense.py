"""Where a traced step has too many rows for skipping to pay: plain products of the masked inputs.

As plain torch functions the masks become part of the kernels beside them (a norm, an activation),
so that such a step costs what the dense model's does. Which shapes skip up to how many rows is
measured (``wina autotune``); a step's rows are known when it is traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from wina.kernels import gpu, ops

OPS = torch.ops.wina


def use_dense(module: GraphModule) -> None:
    """Replace in place the sparse operators of GPU tensors that would not skip anything."""
    for node in module.graph.nodes:
        x = _value(node.args[0]) if node.args else None
        if node.op != "call_function" or not isinstance(x, torch.Tensor) or not x.is_cuda:
            continue  # some values are tuples of tensors
        if node.target in (OPS.sparse_linear, OPS.sparse_linear.default):
            if not gpu.skips(x, [_outputs(node.args[1])], gated=False):
                node.target = ops.reference_linear
        elif node.target in (OPS.sparse_linears, OPS.sparse_linears.default):
            if not gpu.skips(x, [_outputs(w) for w in node.args[1]], gated=False):
                node.target = ops.reference_linears
        elif node.target in (OPS.sparse_gated_mlp, OPS.sparse_gated_mlp.default):
            gate, _, down = (_outputs(w) for w in node.args[1:4])
            hidden = x.new_empty((*x.shape[:-1], gate))
            if not (gpu.skips(x, [gate], gated=True) and gpu.skips(hidden, [down], gated=False)):
                node.target = ops.reference_gated_mlp


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None


def _outputs(weight: Any) -> int:
    return int(_value(weight).shape[0])
