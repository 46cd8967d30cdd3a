"""The Triton kernel through Triton's interpreter, on the CPU, against the reference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from wina.kernels import reference

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton and TRITON_INTERPRET=1",
)


def case(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, level: float) -> tuple:
    torch.manual_seed(tokens + inputs + outputs)
    x = torch.randn(tokens, inputs).to(dtype)
    weight = (torch.randn(inputs, outputs) / inputs**0.5).to(dtype).t()
    return x, weight, level * torch.rand(inputs), torch.randn(outputs).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 40, 24), (3, 33, 130), (8, 7, 5)])
def test_rows(dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> None:
    from wina.kernels.triton.rows import rows

    x, weight, thresholds, bias = case(tokens, inputs, outputs, dtype, 2.0)
    wanted = reference.sparse_linear(*(t.double() for t in (x, weight, thresholds, bias)))
    tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
    found = rows(x, weight, thresholds, bias)
    assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(found, rows(x, weight, thresholds, bias))


@pytest.mark.parametrize("level", [0.0, float("inf")])
def test_rows_all_and_none(level: float) -> None:
    from wina.kernels.triton.rows import rows

    x, weight, _, _ = case(2, 20, 16, torch.float32, 0.0)
    thresholds = torch.full((20,), level)
    assert_close(rows(x, weight, thresholds, None), reference.sparse_linear(x, weight, thresholds))


def test_a_live_nan_is_seen_and_a_dropped_inf_is_not() -> None:
    from wina.kernels.triton.rows import rows

    x, weight, thresholds, _ = case(1, 20, 16, torch.float32, 1.0)
    x[0, 3] = float("nan")
    assert rows(x, weight, thresholds, None).isnan().all()
    x[0, 3] = float("-inf")
    assert rows(x, weight, torch.full((20,), float("inf")), None).isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 7), (5, 300), (3, 1024)])
def test_gate_of_some_rows(dtype: torch.dtype, rows: int, inputs: int) -> None:
    from wina.kernels.triton.gate import gate_rows

    torch.manual_seed(rows)
    x, thresholds = torch.randn(rows, inputs).to(dtype), torch.rand(3, inputs)
    x[0, 0] = float("nan")
    flags = torch.arange(rows) % 2 == 0
    found = gate_rows(x, thresholds, flags)
    dropped = flags[:, None] & (x.abs().float() < thresholds[:, None])
    wanted = torch.where(dropped, 0, x)
    assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert found.dtype == dtype


# float16 alone: the interpreter multiplies bfloat16's bits as integers.
@pytest.mark.parametrize(
    ("rows", "inputs", "sizes"),
    [(3, 136, (72,)), (17, 264, (64, 24, 40)), (5, 128, (64, 64)), (64, 72, (16,)), (1, 8, (8,))],
)
@pytest.mark.parametrize(
    "cut", [None, (16, 32, 3, 2, 4), (32, 16, 1, 2, 4), (32, 16, 2, 2, 4, True)]
)
@pytest.mark.parametrize("flagged", [True, False])
def test_masked_product(
    rows: int, inputs: int, sizes: tuple[int, ...], cut: tuple[int, ...] | None, flagged: bool
) -> None:
    from wina.kernels.triton.product import Cut, masked_product, serves

    torch.manual_seed(rows)
    half = torch.float16
    x = torch.randn(rows, inputs).to(half)
    weights = [(torch.randn(inputs, n) / inputs**0.5).to(half).t() for n in sizes]
    thresholds = [2 * torch.rand(inputs) for _ in sizes]
    thresholds[0][::5] = x[0, ::5].abs().float()  # exactly at the threshold: kept
    biases = [None if i == 1 else torch.randn(n).to(half) for i, n in enumerate(sizes)]
    extras = [torch.randn(n).to(half) for n in sizes] if flagged else []
    flags = torch.rand(rows) > 0.5 if flagged else None
    if cut is None and not serves(x, weights, thresholds):
        pytest.skip("a product on a masked copy serves")
    out = torch.empty(rows, sum(sizes), dtype=half) if flagged else None
    for _ in range(2):  # its tickets are as they were
        found = masked_product(
            x, weights, thresholds, biases, flags=flags, sparse_biases=extras, out=out,
            cut=cut and Cut(*cut),
        )  # fmt: skip
        sparse = torch.ones(rows, dtype=torch.bool) if flags is None else flags
        for place, (one, w, t, b) in enumerate(
            zip(found, weights, thresholds, biases, strict=True)
        ):
            kept = torch.where(sparse[:, None] & (x.abs().float() < t), 0, x).double()
            wanted = kept @ w.double().t() + (0 if b is None else b.double())
            if extras:
                wanted += sparse[:, None] * extras[place].double()
            assert_close(one.double(), wanted, rtol=4e-3, atol=4e-3)
    if out is not None:
        assert torch.equal(out, torch.cat(found, -1))


def test_masked_product_sees_nan_and_what_it_does_not_serve() -> None:
    from wina.kernels.triton.product import ROWS, Cut, masked_product, serves

    x, weight, thresholds, _ = case(2, 64, 16, torch.float16, 0.0)
    x[0, 3] = float("nan")
    (found,) = masked_product(x, [weight], [torch.full((64,), float("inf"))], [None])
    assert found[0].isnan().all()
    assert not found[1].any()
    assert not serves(x.float(), [weight], [thresholds])
    assert not serves(x, [weight.contiguous()], [thresholds])
    assert not serves(x.new_zeros(ROWS + 1, 64), [weight], [thresholds])
    with pytest.raises(ValueError, match="65 rows; the product takes 64"):
        masked_product(x.new_zeros(65, 64), [weight], [thresholds], [None], cut=Cut())
    assert not serves(x.new_zeros(0, 64), [weight], [thresholds])
    assert not serves(x, [weight] * 4, [thresholds] * 4)
    assert serves(x, [weight], [thresholds])
    assert serves(x.new_zeros(20, 64), [weight], [thresholds])
    assert not serves(x.new_zeros(40, 64), [weight], [thresholds])


def test_the_masked_product_compiles_for_hopper(tmp_path: Path) -> None:
    """What the interpreter does not see: types, and that loads stay asynchronous."""
    script = Path(__file__).with_name("compile_triton.py")
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = {**kept, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
