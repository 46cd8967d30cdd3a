"""Every backend and instruction set computes what the reference computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from wina.kernels import (
    available_backends,
    reference,
    sparse_gated_mlp,
    sparse_linear,
    sparse_linears,
)
from wina.kernels.cpu import use_instruction_set

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Sums run in another order, and are rounded to the dtype once.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([128, 255, 256, 1000]))
compiled = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the compiled kernels were not built"
)


def has(name: str) -> bool:
    try:
        with use_instruction_set(name):
            return True
    except (ValueError, OSError):
        return False


INSTRUCTION_SETS = [name for name in ("portable", "avx2", "avx512", "avx512_bf16") if has(name)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def input_major(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


def exact(x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None = None) -> Tensor:
    """The reference, summed in float64 and rounded once."""
    wide = functional.linear(
        reference.drop(x, thresholds).double(),
        weight.double(),
        None if bias is None else bias.double(),
    )
    return wide.to(x.dtype)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """An input, an input-major weight, thresholds and a bias."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    inputs, outputs = draw(SIZES), draw(SIZES)
    rows = draw(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 17]))
    shape = draw(st.sampled_from([(inputs,), (rows, inputs), (2, rows, inputs)]))
    x = torch.randn(shape).to(dtype)
    weight = (torch.randn(outputs, inputs) / max(inputs, 1) ** 0.5).to(dtype)
    level = draw(st.sampled_from([0.0, 0.3, 0.7, 2.0, float("inf")]))  # inf: nothing is live
    thresholds = level * torch.rand(inputs) if level < 9 else torch.full((inputs,), level)
    bias = torch.randn(outputs).to(dtype) if draw(st.booleans()) else None
    return x, input_major(weight), thresholds, bias


@compiled
@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(INSTRUCTION_SETS or ["none"]), st.sampled_from([1, 2]))
def test_sparse_linear(case: tuple, name: str, count: int) -> None:
    with use_instruction_set(name), threads(count):
        assert_close(sparse_linear(*case), exact(*case), **TOLERANCE[case[0].dtype])


@compiled
@settings(max_examples=40, deadline=None)
@given(cases(), st.lists(SIZES, min_size=1, max_size=3), st.sampled_from([1, 2]))
def test_sparse_linears(case: tuple, outputs: list[int], count: int) -> None:
    x, _, thresholds, _ = case
    inputs = x.shape[-1]
    weights = [(torch.randn(n, inputs) / max(inputs, 1) ** 0.5).to(x.dtype) for n in outputs]
    weights = [input_major(w) if i != 1 else w for i, w in enumerate(weights)]  # one dense layout
    vectors = [thresholds * (i + 1) / 2 for i in range(len(outputs))]
    biases = [torch.randn(n).to(x.dtype) if n % 2 else None for n in outputs]
    with threads(count):
        results = sparse_linears(x, weights, vectors, biases)
    for result, weight, vector, bias in zip(results, weights, vectors, biases, strict=True):
        assert_close(result, exact(x, weight, vector, bias), **TOLERANCE[x.dtype])


@compiled
@settings(max_examples=60, deadline=None)
@given(
    cases(),
    SIZES,
    st.sampled_from(sorted(reference.ACTIVATIONS)),
    st.sampled_from(INSTRUCTION_SETS or ["none"]),
    st.sampled_from([1, 2]),
)
def test_sparse_gated_mlp(case: tuple, hidden: int, act: str, name: str, count: int) -> None:
    # float32 alone: rounding in between can push a channel over its threshold.
    x, weight, thresholds, bias = (None if part is None else part.float() for part in case)
    inputs = x.shape[-1]
    gate, up = (input_major(torch.randn(hidden, inputs) / max(inputs, 1) ** 0.5) for _ in "gu")
    down = input_major(torch.randn(weight.shape[0], hidden) / max(hidden, 1) ** 0.5)
    hidden_bias = torch.randn(hidden) if hidden % 2 else None
    arguments = (x, gate, up, down, thresholds, thresholds / 2, torch.full((hidden,), 0.05), act)
    biases = (hidden_bias, None, bias)
    with use_instruction_set(name), threads(count):
        result = sparse_gated_mlp(*arguments, *biases)
    expected = reference.sparse_gated_mlp(
        *(part.double() for part in arguments[:7]),
        act,
        *(None if part is None else part.double() for part in biases),
    )
    # A hidden channel within rounding of its threshold may go either way.
    assert_close(result, expected.float(), rtol=1e-3, atol=2e-2)


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_gated_mlp_rounds_where_the_dense_model_does(
    dtype: torch.dtype, act: str, name: str
) -> None:
    # One-hot weights: the result is act(x) * x itself, for every kind of number.
    x = torch.cat([torch.linspace(-12, 12, 500), torch.tensor([0.0, -0.0, 60.0, -60.0, 1e-6])])
    x = x.to(dtype)
    eye = torch.eye(len(x), dtype=dtype)
    zero = torch.zeros(len(x))
    with use_instruction_set(name):
        result = sparse_gated_mlp(x, eye, eye, eye, zero, zero, zero, act)
    expected = reference.ACTIVATIONS[act](x) * x
    # One unit in the last place where the activation's float32 value is near a tie; torch's own
    # GELU loses its digits in the far tail.
    assert_close(result, expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-5)
    assert (result != expected)[x > -2].float().mean() < 0.02


@compiled
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_nan_and_infinity_are_seen(name: str, dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 40).to(dtype)
    x[0, 3], x[rows - 1, 21] = float("nan"), float("inf")
    weight = input_major(torch.ones(33, 40, dtype=dtype))
    with use_instruction_set(name):
        high = torch.full((40,), 3e38)
        result = sparse_linear(x, weight, high)
        assert result[0].isnan().all()
        if rows > 1:
            assert (result[1] == 0).all()
            assert result[2].isposinf().all()


@compiled
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(3, 1024).bfloat16()
    weights = [input_major(torch.randn(n, 1024).bfloat16()) for n in (1536, 200, 64)]
    vectors = [torch.rand(1024)] * 3
    with threads(1):
        one = sparse_linears(x, weights, vectors)
    with threads(2):
        two = sparse_linears(x, weights, vectors)
        again = sparse_linears(x, weights, vectors)
    for a, b, c in zip(one, two, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_input_and_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(24, 48).to(dtype)
    padded = torch.zeros(48, 40, dtype=dtype)
    padded[:, :24] = weight.t()
    thresholds = torch.rand(48)
    wide = torch.randn(5, 96).to(dtype)
    for x in (wide[:, ::2], wide[:, 48:], wide.t()[:48].t(), wide[:1, :48].expand(5, 48)):
        expected = exact(x, weight, thresholds)
        for layout in (weight, input_major(weight), padded[:, :24].t(), weight.flip(0).flip(0)):
            result = sparse_linear(x, layout, thresholds)
            assert result.is_contiguous()
            assert_close(result, expected, **TOLERANCE[dtype])


def test_zero_thresholds_of_the_reference_are_bit_equal_to_dense() -> None:
    for dtype in DTYPES:
        x, weight = torch.randn(3, 40).to(dtype), torch.randn(20, 40).to(dtype)
        bias = torch.randn(20).to(dtype)
        result = reference.sparse_linear(x, weight, torch.zeros(40), bias)
        assert torch.equal(result, functional.linear(x, weight, bias))


def test_wrong_arguments_are_refused() -> None:
    x, weight, thresholds = torch.randn(1, 8), input_major(torch.randn(4, 8)), torch.zeros(8)
    for wrong in (
        (x, weight, torch.zeros(7)),
        (x, weight, torch.zeros(16)[::2].double()),
        (x, weight[:, :7], thresholds),
        (x, weight.bfloat16(), thresholds),
        (x, weight, thresholds, torch.zeros(5)),
    ):
        if "cpu" in available_backends() or wrong[2].dtype != torch.float64:
            with pytest.raises(RuntimeError):
                sparse_linear(*wrong)


def test_float64() -> None:
    x, weight = torch.randn(2, 8).double(), input_major(torch.randn(8, 8).double())
    thresholds = torch.rand(8)
    assert_close(sparse_linear(x, weight, thresholds), exact(x, weight, thresholds))
    for act in reference.ACTIVATIONS:
        arguments = (x, *[weight] * 3, *[thresholds] * 3, act)
        assert_close(sparse_gated_mlp(*arguments), reference.sparse_gated_mlp(*arguments))
