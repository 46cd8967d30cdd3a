"""Dense rows and attention of one position: every instruction set against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.test_sparse_linear import DTYPES, INSTRUCTION_SETS, TOLERANCE, compiled, threads
from torch.nn import functional
from torch.testing import assert_close

from wina.kernels import decode_attention, dense_linear, drop_each, reference
from wina.kernels.cpu import use_instruction_set

SIZES = st.sampled_from([0, 1, 7, 31, 32, 64, 70, 255, 256, 300, 1000])


@compiled
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@settings(max_examples=30)
@given(data=st.data())
def test_dense_rows(name: str, data: st.DataObject) -> None:
    rows, inputs, outputs = data.draw(st.integers(0, 10)), data.draw(SIZES), data.draw(SIZES)
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    weight = (torch.randn(outputs, inputs) / max(1, inputs) ** 0.5).to(dtype)
    layouts = [weight, weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :inputs]]
    given_bias = bias if data.draw(st.booleans()) else None
    wide = None if given_bias is None else bias.float()
    wanted = functional.linear(x.float(), weight.float(), wide).to(dtype)
    with use_instruction_set(name), threads(data.draw(st.sampled_from([1, 2]))):
        for layout in layouts:
            assert_close(dense_linear(x, layout, given_bias), wanted, **TOLERANCE[dtype])


@compiled
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@settings(max_examples=30)
@given(data=st.data())
def test_attention(name: str, data: st.DataObject) -> None:
    batch, shared = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    heads = shared * data.draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    size, positions = data.draw(st.sampled_from([1, 5, 16, 64])), data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(batch, heads, 1, size).to(dtype)
    # Keys and values of a longer cache, and another size of values.
    key = torch.randn(batch, shared, positions + 3, size).to(dtype)[:, :, :positions]
    value = torch.randn(batch, shared, positions + 3, size + 3).to(dtype)[:, :, :positions]
    mask = torch.rand(data.draw(st.sampled_from([1, batch])), 1, 1, positions) < 0.6
    mask[..., data.draw(st.integers(0, positions - 1))] = True
    wide = (x.float() for x in (query, key, value))
    wanted = reference.decode_attention(*wide, mask, 0.2).to(dtype)
    with use_instruction_set(name), threads(data.draw(st.sampled_from([1, 2]))):
        found = decode_attention(query, key, value, mask, 0.2)
    assert_close(found, wanted, **TOLERANCE[dtype])


@compiled
def test_what_is_masked_is_never_read() -> None:
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mask = torch.arange(9)[None, None, None] < 6
    wanted = decode_attention(query, key, value, mask, 1.0)
    key[:, :, 6:] = value[:, :, 6:] = torch.nan
    assert torch.equal(decode_attention(query, key, value, mask, 1.0), wanted)
    key[:, :, 0] = torch.nan
    assert decode_attention(query, key, value, mask, 1.0).isnan().all()


@compiled
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_each_projection_has_its_own_mask(name: str, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    x, thresholds = torch.randn(rows, 70).to(dtype), torch.rand(3, 70)
    if rows:
        x[0, 0] = torch.nan
    wanted = torch.stack([reference.drop(x, vector) for vector in thresholds])
    with use_instruction_set(name), threads(2):
        found = drop_each(x, thresholds)
        other = drop_each(x.t().contiguous().t(), thresholds)
    assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert_close(other, wanted, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="thresholds must be contiguous float32"):
        drop_each(torch.randn(2, 5), torch.rand(3, 4))


def test_opcheck() -> None:
    x, weight = torch.randn(2, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    ops = torch.ops.wina
    torch.library.opcheck(ops.dense_linear.default, (x, weight, []))
    torch.library.opcheck(ops.drop_each.default, (x, torch.rand(3, 32)))
    torch.library.opcheck(ops.dense_linear.default, (x, weight, [torch.randn(48).bfloat16()]))
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    torch.library.opcheck(ops.decode_attention.default, (query, key, key, mask, 0.5))


@compiled
def test_wrong_arguments_are_refused() -> None:
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="mask must be bool"):
        decode_attention(query, key, key, mask[..., :5], 1.0)
    with pytest.raises(RuntimeError, match="heads a multiple"):
        decode_attention(query[:, :3], key, key, mask, 1.0)
    with pytest.raises(RuntimeError, match="weight must have shape"):
        dense_linear(torch.randn(1, 5), torch.randn(4, 6))
