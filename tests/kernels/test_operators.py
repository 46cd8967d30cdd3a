"""The operators as torch and torch.compile see them, and the choice of a backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wina.errors import UsageError
from wina.kernels import (
    active_backend,
    available_backends,
    sparse_gated_mlp,
    sparse_linear,
    sparse_linears,
    use_backend,
)


def input_major(outputs: int, inputs: int) -> Tensor:
    return (torch.randn(inputs, outputs) / inputs**0.5).bfloat16().t()


GATE, UP, DOWN = input_major(48, 32), input_major(48, 32), input_major(32, 48)
T_IN, T_HIDDEN = torch.rand(32), torch.rand(48) / 4


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_opcheck(rows: int) -> None:
    x = torch.randn(rows, 32).bfloat16()
    bias = [torch.randn(48).bfloat16()]
    ops = torch.ops.wina
    torch.library.opcheck(ops.sparse_linear.default, (x, GATE, T_IN, []))
    torch.library.opcheck(ops.sparse_linear.default, (x, GATE, T_IN, bias))
    torch.library.opcheck(
        ops.sparse_linears.default, (x, [GATE, UP], [T_IN, T_IN], [*bias, x.new_empty(0)])
    )
    torch.library.opcheck(
        ops.sparse_gated_mlp.default,
        (x, GATE, UP, DOWN, T_IN, T_IN, T_HIDDEN, "silu", []),
    )


def test_compiled_in_one_graph() -> None:
    def step(x: Tensor) -> Tensor:
        a, b = sparse_linears(x, [GATE, UP], [T_IN, T_IN], [None, GATE[:, 0].contiguous()])
        y = sparse_gated_mlp(x, GATE, UP, DOWN, T_IN, T_IN, T_HIDDEN)
        return y + sparse_linear(a * b, DOWN, T_HIDDEN)

    x = torch.randn(1, 32).bfloat16()
    fast = torch.compile(step, fullgraph=True)
    assert torch.equal(fast(x), step(x))
    with use_backend("reference"):  # inductor rounds elsewhere, so thresholds can fall otherwise
        assert fast(x).shape == x.shape


def test_inference_with_parameters() -> None:
    weight = torch.nn.Parameter(GATE.clone(memory_format=torch.preserve_format))
    with torch.no_grad():
        assert not sparse_linear(torch.randn(1, 32).bfloat16(), weight, T_IN).requires_grad
    with torch.inference_mode():
        sparse_linear(torch.randn(1, 32).bfloat16(), weight, T_IN)


def test_choice_of_backend() -> None:
    assert "reference" in available_backends()
    before = active_backend()
    with use_backend("reference"):
        assert active_backend() == "reference"
        with use_backend("auto"):
            assert active_backend() == "auto"
    assert active_backend() == before
    with pytest.raises(UsageError, match="Did you mean 'reference'"):
        use_backend("referense").__enter__()
    with pytest.raises(UsageError, match="relu"):
        sparse_gated_mlp(torch.zeros(1, 32), GATE, UP, DOWN, T_IN, T_IN, T_HIDDEN, "swish")
