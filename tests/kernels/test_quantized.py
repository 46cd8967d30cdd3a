"""Kernels on quantized weights compute what the dequantized weights do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import make_config, make_plan, prompt
from tests.kernels.test_sparse_linear import INSTRUCTION_SETS, compiled, threads
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import wina
from wina.generation import Decoder, decoder
from wina.generation.decoder import record
from wina.kernels import (
    QuantizedWeight,
    available_backends,
    blocks,
    fusion,
    pack,
    quantized,
    quantized_linear,
    reference,
    use_backend,
)
from wina.kernels.cpu import use_instruction_set
from wina.kernels.quantized import by_block, dequantize, unpack
from wina.layers import lay_out_for_decode, sparsify
from wina.models.quantize import Scheme, quantize

OPS = torch.ops.wina
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the sum of magnitudes: the result is rounded to the dtype once.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}
ZEROS = ("none", "points", "minima")


@dataclass(frozen=True)
class Case:
    """A weight and an input, drawn from a seed."""

    seed: int
    out: int
    groups: int
    group: int
    bits: int
    zeros: str
    dtype: torch.dtype
    rows: int
    sparsity: float
    by_block: bool = False

    def weight(self) -> QuantizedWeight:
        generator = torch.Generator().manual_seed(self.seed)
        bound = 1 << (self.bits - 1)
        shape = (self.out, self.groups * self.group)
        codes = torch.randint(-bound, bound, shape, generator=generator)
        scales = torch.randn(self.out, self.groups, generator=generator) * 0.1
        scales[torch.rand(scales.shape, generator=generator) < 0.1] = 0  # whole groups of zeros
        scales = scales.to(self.dtype)
        zeros = None
        if self.zeros == "points":
            zeros = torch.randint(-bound, bound, scales.shape, generator=generator).to(torch.int8)
        elif self.zeros == "minima" and self.bits == 4:
            zeros = torch.randn(scales.shape, generator=generator).to(self.dtype)
        packed = pack(codes, scales, zeros, self.bits)
        return by_block(packed) if self.by_block else packed

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(self.rows, self.groups * self.group, generator=generator)
        x[:, torch.rand(x.shape[1], generator=generator) < 0.05] *= 300  # as activations have them
        return x.to(self.dtype)

    def thresholds(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 2)
        found = torch.rand(self.groups, self.group, generator=generator) * 4 * self.sparsity
        if self.sparsity:
            found[::3] = torch.inf  # groups of which no channel lives
        return found.flatten()


CASES = st.builds(
    Case,
    seed=st.integers(0, 1 << 20),
    out=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 256, 576, 4100])),
    groups=st.integers(1, 5),
    group=st.sampled_from([1, 2, 11, 32, 33, 64, 128]),
    bits=st.sampled_from([4, 8]),
    zeros=st.sampled_from(ZEROS),
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([0, 1, 2, 5]),
    sparsity=st.sampled_from([0.0, 0.5, 1.0]),
    by_block=st.booleans(),
)


def check(found: Tensor, x: Tensor, weight: QuantizedWeight, thresholds: Tensor) -> None:
    matrix, kept = dequantize(weight).double(), reference.drop(x, thresholds).double()
    if weight.zeros.is_floating_point() and weight.zeros.numel():
        # s q and m may cancel: what is rounded is larger than their sum.
        group = weight.group_size
        size = weight.scales.t().double().abs().repeat_interleave(group, 1) * 128
        size = size + weight.zeros.t().double().abs().repeat_interleave(group, 1)
    else:
        size = (
            matrix.abs()
            + weight.scales.t().double().abs().repeat_interleave(weight.group_size, 1) * 16
        )
    limit = TOLERANCE[x.dtype] * (kept.abs() @ size.t()) + 1e-7
    assert ((found.double() - kept @ matrix.t()).abs() <= limit).all()


@compiled
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@settings(max_examples=60, deadline=None)
@given(case=CASES)
def test_every_instruction_set(name: str, case: Case) -> None:
    weight, x, thresholds = case.weight(), case.x(), case.thresholds()
    with use_instruction_set(name):
        found = quantized_linear(x, weight, thresholds)
    assert found.shape == (case.rows, case.out)
    assert found.dtype == case.dtype
    check(found, x, weight, thresholds)


@settings(max_examples=60, deadline=None)
@given(case=CASES)
def test_the_layout_holds_every_code(case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    bound = 1 << (case.bits - 1)
    codes = torch.randint(-bound, bound, (case.out, case.groups * case.group), generator=generator)
    weight = case.weight()
    assert torch.equal(unpack(weight), codes.to(torch.int8))
    assert weight.shape == codes.shape
    assert weight.bits == case.bits
    assert weight.group_size == case.group
    block = 64 * 8 // case.bits
    assert weight.code_bytes == codes.shape[1] * -(-case.out // block) * 64


def test_dequantize_by_hand() -> None:
    codes = torch.tensor([[-8, 7, 3, 0], [1, 2, -3, 4]])
    scales = torch.tensor([[2.0, 0.5], [0.0, 1.0]])
    points = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    assert dequantize(pack(codes, scales)).tolist() == [[-16, 14, 1.5, 0], [0, 0, -3, 4]]
    assert dequantize(pack(codes, scales, points)).tolist() == [[-18, 12, 2.5, 1], [0, 0, -7, 0]]
    minima = torch.tensor([[1.0, 0.25], [5.0, 0.0]])
    wanted = [[1, 31, 5.75, 4.25], [5, 5, 5, 12]]
    assert dequantize(pack(codes, scales, minima)).tolist() == wanted


@compiled
@pytest.mark.parametrize("bits", [4, 8])
def test_what_lives_nowhere_gives_the_bias(bits: int) -> None:
    weight = Case(0, 130, 4, 32, bits, "minima", torch.float32, 1, 0).weight()
    bias = torch.randn(130)
    found = quantized_linear(torch.randn(1, 128), weight, torch.full((128,), 1e9), bias)
    assert torch.equal(found[0], bias)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(dtype: torch.dtype, value: float) -> None:
    weight = Case(0, 70, 2, 32, 4, "points", dtype, 1, 0).weight()
    x = torch.randn(2, 64).to(dtype)
    x[1, 40] = value
    found = quantized_linear(x, weight, torch.full((64,), 0.5))
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


@compiled
def test_tiny_and_huge_values() -> None:
    weight = Case(3, 96, 2, 32, 8, "none", torch.float32, 1, 0).weight()
    for size in (1e-32, 1e-20, 1e20, 1e30):
        x = torch.randn(1, 64) * size
        wanted = x.double() @ dequantize(weight).double().t()
        found = quantized_linear(x, weight, torch.zeros(64)).double()
        torch.testing.assert_close(found / size, wanted / size, rtol=1e-4, atol=1e-3)


@compiled
@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(count: int) -> None:
    case = Case(1, 4100, 4, 64, 4, "none", torch.bfloat16, 1, 0.5)
    arguments = (case.x(), case.weight(), case.thresholds())
    with threads(1):
        wanted = quantized_linear(*arguments)
    with threads(count):
        assert torch.equal(quantized_linear(*arguments), wanted)


def several(dtype: torch.dtype, hidden: int = 96) -> list[QuantizedWeight]:
    """Weights of a gated MLP of 64 inputs, of unlike formats."""
    kinds = (
        (hidden, 2, 32, 4, "none"),
        (hidden, 1, 64, 8, "points"),
        (64, 3, hidden // 3, 4, "minima"),
    )
    return [Case(i, *kind, dtype, 1, 0).weight() for i, kind in enumerate(kinds)]


SIZES = ((0, 700), (1, 300))  # seed, outputs


def flat(weights: list[QuantizedWeight]) -> list[Tensor]:
    return [tensor for weight in weights for tensor in weight]


@compiled
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [2, 3, 5, 8])
def test_rows_that_threads_share_have_the_bits_of_each_alone(rows: int, count: int) -> None:
    """Of two projections with lists of their own, so that a thread begins within a row."""
    weights = [Case(i, n, 6, 64, 4, "points", torch.bfloat16, 1, 0).weight() for i, n in SIZES]
    x = torch.randn(rows, 384).bfloat16()
    thresholds = [torch.full((384,), 0.3), torch.rand(384) * 2]
    biases = [torch.empty(0, dtype=x.dtype), torch.randn(SIZES[1][1]).to(x.dtype)]
    rest = (flat(weights), thresholds, biases, [])
    with threads(1):
        alone = [OPS.quantized_linears(x[i][None], [], 0.0, *rest) for i in range(rows)]
    with threads(count):
        found = OPS.quantized_linears(x, [], 0.0, *rest)
    for one, parts in zip(found, zip(*alone, strict=True), strict=True):
        assert torch.equal(one, torch.cat(parts))


@compiled
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_fused_operators(rows: int, whole: bool) -> None:
    """In float32, where no rounding moves a value over a threshold."""
    torch.manual_seed(0)
    gate, up, _ = weights = several(torch.float32)
    x, norm, other = torch.randn(1, rows, 64), torch.rand(64), torch.randn(1, rows, 96)
    thresholds = [torch.full((64,), 0.3), torch.rand(64), torch.full((96,), 0.2)]
    biases = [torch.randn(96), torch.empty(0), torch.randn(64)] if whole else []
    norms, residual = ([norm], [other]) if whole else ([], [])
    arguments = (x, norms, 1e-5, flat([gate, up]), thresholds[:2], biases[:2], residual)
    found = OPS.quantized_linears(*arguments)
    wanted = quantized._linears(*arguments)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    rest = ("silu", biases, [x] if whole else [])
    arguments = (x, norms, 1e-5, flat(weights), thresholds, *rest)
    found, wanted = OPS.quantized_gated_mlp(*arguments), quantized._gated_mlp(*arguments)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@compiled
def test_a_compiled_step_fuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v in one call with their norm; the MLP in one with norm and residual."""
    torch.manual_seed(0)
    gate, up, down = several(torch.float32)
    x, norm, y = torch.randn(1, 1, 64), torch.rand(64), torch.empty(1, 1, 64)
    thresholds = [torch.full((64,), 0.3), torch.rand(64), torch.full((96,), 0.2)]

    def normed(x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return norm * wide.to(torch.float32)

    def step() -> None:
        z = normed(x)
        a = quantized_linear(z, gate, thresholds[0]) + quantized_linear(z, up, thresholds[1])
        z = normed(x)
        hidden = functional.silu(quantized_linear(z, gate, thresholds[0]))
        hidden = hidden * quantized_linear(z, up, thresholds[1])
        y.copy_(x + quantized_linear(hidden, down, thresholds[2]) + a.sum())

    with torch.no_grad():
        step()
        wanted = y.clone()
        seen: list[str] = []

        def noting(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
            found = fuse(graph)
            seen.extend(
                str(node.target) for node in found.graph.nodes if "wina" in str(node.target)
            )
            return found

        fuse = decoder.fuse
        monkeypatch.setattr(decoder, "fuse", noting)
        again = record(step)
        y.zero_()
        again()
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    assert sorted(seen) == ["wina.quantized_gated_mlp", "wina.quantized_linears"]


def test_the_reference_serves_where_it_is_asked_for_and_for_gradients() -> None:
    case = Case(5, 40, 2, 32, 4, "points", torch.float32, 3, 0.5)
    x, weight, thresholds = case.x(), case.weight(), case.thresholds()
    wanted = functional.linear(reference.drop(x, thresholds), dequantize(weight))
    with use_backend("reference"):
        assert torch.equal(quantized_linear(x, weight, thresholds), wanted)
    y = quantized_linear(x.requires_grad_(), weight, thresholds)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    kept = reference.drop(x.detach(), thresholds) != 0
    assert torch.equal(gradient != 0, kept & (dequantize(weight).sum(0) != 0))
    double = quantized_linear(x.detach().double(), weight, thresholds)
    assert double.dtype == torch.float64


@compiled
def test_fake_tensors_have_the_shapes() -> None:
    weight = Case(0, 40, 2, 32, 4, "none", torch.float32, 3, 0).weight()
    arguments = (torch.randn(3, 64), list(weight), torch.zeros(64), [])
    torch.library.opcheck(OPS.quantized_linear, arguments, test_utils="test_faketensor")
    mlp = several(torch.float32)
    zeros = [torch.zeros(64), torch.zeros(64), torch.zeros(96)]
    arguments = (torch.randn(3, 64), [], 0.0, flat(mlp), zeros, "silu", [], [])
    torch.library.opcheck(OPS.quantized_gated_mlp, arguments, test_utils="test_faketensor")
    arguments = (torch.randn(3, 64), [], 0.0, flat(mlp[:2]), zeros[:2], [], [])
    torch.library.opcheck(OPS.quantized_linears, arguments, test_utils="test_faketensor")


def test_what_cannot_be_packed_is_refused() -> None:
    codes, scales = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 2)
    with pytest.raises(wina.UsageError, match="5 bits"):
        pack(codes, scales, bits=5)
    with pytest.raises(wina.UsageError, match="groups of one size"):
        pack(codes, torch.ones(4, 3))
    with pytest.raises(wina.UsageError, match="float64"):
        pack(codes, scales.double())
    with pytest.raises(wina.UsageError, match="zeros"):
        pack(codes, scales, torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(wina.UsageError, match="not minima"):
        pack(codes, scales, scales, bits=8)
    with pytest.raises(wina.UsageError, match="outside -8 to 7"):
        pack(codes + 8, scales)


@compiled
def test_bad_arguments_are_refused() -> None:
    weight = Case(0, 40, 2, 32, 4, "none", torch.float32, 1, 0).weight()
    x, none = torch.randn(1, 64), torch.zeros(64)
    with pytest.raises(RuntimeError, match="row of codes for each channel"):
        OPS.quantized_linear(torch.randn(1, 32), list(weight), torch.zeros(32), [])
    with pytest.raises(RuntimeError, match="as many thresholds"):
        OPS.quantized_linear(x, list(weight[:2]), none, [])
    with pytest.raises(RuntimeError, match="blocks"):
        OPS.quantized_linear(x, [weight.codes, torch.ones(2, 400), weight.zeros], none, [])
    with pytest.raises(RuntimeError, match="bias"):
        OPS.quantized_linear(x, list(weight), none, [torch.zeros(3)])
    with pytest.raises(RuntimeError, match="float64"):
        OPS.quantized_linear(x.double(), list(weight), none, [])


@compiled
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str
)
def test_a_quantized_models_blocks_run_in_one_call(
    monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: torch.dtype, tolerance: float
) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    config = make_config("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 96, 16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    quantize(model, Scheme.parse(scheme))
    sparsify(model, make_plan(model, 0.4, bias=True))
    lay_out_for_decode(model)
    wanted, found = Decoder(model, 30), Decoder(model, 30, mode="compiled")
    numbers: list[int] = []

    def spy(*arguments: Any) -> Any:
        result = blocks.run_blocks(*arguments)
        numbers.extend(result[2])
        return result

    monkeypatch.setattr(decoder, "run_blocks", spy)
    for one in (wanted, found):
        one.prefill(prompt(9))
    for _ in range(4):
        for one in (wanted, found):
            one.step()
        torch.testing.assert_close(found.logits, wanted.logits, rtol=tolerance, atol=tolerance)
    assert found.mode == "compiled"
    assert len(numbers) == 1


def test_a_dense_linear_of_another_librarys_weight_stays_with_it() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    both = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    torchao.quantize_(both[0], torchao.Int8WeightOnlyConfig())
    x, seen = torch.randn(1, 64), list[object]()

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        found = fusion.fuse(graph)
        seen.extend(node.target for node in found.graph.nodes if node.op == "call_function")
        return found

    with torch.no_grad():
        wanted = both(x)
        torch.testing.assert_close(torch.compile(both, backend=backend)(x), wanted)
    served = [torch.ops.wina.dense_linear] if "cpu" in available_backends() else []
    assert [target for target in seen if target in (torch.ops.wina.dense_linear,)] == served
    assert len(seen) == 2
