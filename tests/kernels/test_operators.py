"""The operators as torch and torch.compile see them, and the choice of a backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


PLUGIN = """
import wina  # at the top level, as any module would
from wina.kernels import reference


def load():
    return f"{wina.__name__} and {reference.__name__} were there"
"""


def test_a_plugin_backend_may_import_wina(tmp_path: Path) -> None:
    (tmp_path / "my_backend.py").write_text(PLUGIN)
    info = tmp_path / "my_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[wina.backends]\nmine = my_backend:load\n")
    code = (
        "import sys, wina, torch, wina.kernels as k\n"
        "assert 'my_backend' not in sys.modules\n"
        "k.sparse_linear(torch.ones(1, 4), torch.ones(2, 4), torch.zeros(4))\n"
        "assert 'my_backend' in sys.modules and 'mine' not in k.available_backends()\n"
        "print(k.backends.unavailable('mine'))\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ, PYTHONPATH=path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "wina and wina.kernels.reference were there"


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_reach_what_was_kept(compiled: bool) -> None:
    x = torch.randn(3, 32, requires_grad=True)
    weight = torch.randn(48, 32).t().contiguous().t().requires_grad_()
    call = torch.compile(sparse_linear, backend="aot_eager") if compiled else sparse_linear
    call(x, weight, T_IN).sum().backward()
    kept = x.detach().abs() >= T_IN
    torch.testing.assert_close(x.grad, weight.detach().sum(0) * kept)
    torch.testing.assert_close(weight.grad, (x.detach() * kept).sum(0).expand(48, 32))
