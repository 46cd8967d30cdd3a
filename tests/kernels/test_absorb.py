"""Norms and residual sums taken into the sparse operators of a traced step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.helpers import make_model, make_plan
from torch.fx import GraphModule
from torch.testing import assert_close

import wina
from wina.kernels.absorb import absorb
from wina.kernels.fusion import fuse
from wina.layers import phase_of


def traced(model: torch.nn.Module, ids: torch.Tensor) -> tuple[Counter[str], Any]:
    """Return how often each operator stands in the absorbed graph, and the graph's logits."""
    seen: Counter[str] = Counter()

    def backend(graph: GraphModule, inputs: list[torch.Tensor]) -> Any:
        absorb(fuse(graph))
        graph.graph.lint()
        graph.recompile()
        seen.update(
            str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes
        )
        return graph.forward

    torch._dynamo.reset()
    with phase_of(model).force("sparse"):
        logits = torch.compile(model, backend=backend, fullgraph=True)(ids, use_cache=False).logits
    return seen, logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_block_is_two_norms_and_two_sums_fewer(kind: str) -> None:
    model = make_model(kind).eval()
    layers = model.config.num_hidden_layers
    wina.sparsify(model, make_plan(model, 0.5), check=False)
    ids = torch.tensor([[7]])
    with torch.no_grad(), phase_of(model).force("sparse"):
        wanted = model(ids, use_cache=False).logits
        seen, logits = traced(model, ids)
    assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert seen["fused_linears"] == 2 * layers  # norm -> q, k, v; o -> + residual
    assert seen["fused_gated_mlp"] == layers
    extra = 2 * layers if kind == "qwen3" else 0  # norms of queries and keys
    assert seen["rsqrt"] == 1 + extra  # the last norm feeds the head
