"""Steps with too many rows become plain torch: read off fake tensors of a GPU, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx import Node, symbolic_trace
from torch.testing import assert_close

from wina.kernels import gpu, ops
from wina.kernels.dense import use_dense

OPS = torch.ops.wina
SHAPES = {"x": (5, 32), "a": (24, 32), "b": (24, 32), "c": (16, 24), "t": (32,), "u": (24,)}


class Step(nn.Module):
    def forward(self, x, a, b, c, t, u):
        one = OPS.sparse_linear(x, a, t, [])
        two = OPS.sparse_linears(x, [a, b], [t, t], [])
        return one, two[0], two[1], OPS.sparse_gated_mlp(x, a, b, c, t, t, u, "silu", [])


def traced(monkeypatch: pytest.MonkeyPatch, most: dict[tuple[int, bool], int]) -> list[object]:
    """Return the targets of the step's operators, where so many rows are skipped by shape."""
    module = symbolic_trace(Step())
    with FakeTensorMode():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = torch.empty(SHAPES[node.name], device="cuda")

    def skips(x: torch.Tensor, outputs: list[int], *, gated: bool) -> bool:
        return len(x) <= most.get((x.shape[-1], gated), 0)

    monkeypatch.setattr(gpu, "skips", skips)
    use_dense(module)
    module.recompile()
    torch.manual_seed(0)
    values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    values["t"], values["u"] = values["t"].abs(), values["u"].abs()
    for found, wanted in zip(module(**values), Step()(**values), strict=True):
        assert_close(found, wanted)
    names = ("sparse_linear", "sparse_linears", "sparse_gated_mlp")
    plain = (ops.reference_linear, ops.reference_linears, ops.reference_gated_mlp)
    known = {*plain, *(getattr(OPS, name) for name in names)}
    return [x.target for x in module.graph.nodes if isinstance(x, Node) and x.target in known]


def test_none_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [ops.reference_linear, ops.reference_linears, ops.reference_gated_mlp]
    assert traced(monkeypatch, {}) == plain


def test_all_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [OPS.sparse_linear, OPS.sparse_linears, OPS.sparse_gated_mlp]
    assert traced(monkeypatch, {(32, False): 8, (32, True): 8, (24, False): 8}) == kept


def test_an_mlp_skips_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, mlp = traced(monkeypatch, {(32, False): 8, (32, True): 8})
    assert mlp is ops.reference_gated_mlp
