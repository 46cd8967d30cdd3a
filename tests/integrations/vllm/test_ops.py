"""The operator of fused, partly sparse layers, without vLLM."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from wina.errors import UsageError
from wina.integrations.vllm import ops, packed
from wina.integrations.vllm.options import Options, options_of
from wina.integrations.vllm.rows import BATCH
from wina.kernels import reference, use_backend
from wina.kernels.cpu.library import (
    input_major,
    instruction_set,
    set_crossover,
    use_instruction_set,
)

SIZES = [12, 4, 8]


def case(rows: int, dtype: torch.dtype = torch.float32, inputs: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(rows)
    x = torch.randn(rows, inputs).to(dtype)
    weight = input_major((torch.randn(sum(SIZES), inputs) / 4).to(dtype))
    thresholds = torch.rand(len(SIZES), inputs) * 1.5
    bias, extra = (torch.randn(sum(SIZES)).to(dtype) for _ in range(2))
    return x, weight, thresholds, bias, extra


def start(*sparse: bool) -> None:
    """Let the running batch have these rows, each of a request of its own."""
    first = np.array([5 if flag else 0 for flag in sparse])
    BATCH.prefill = "dense"
    BATCH.start(first, np.ones_like(first), np.full_like(first, 5))


def expected(x: Tensor, weight: Tensor, thresholds: Tensor, *biases: Tensor | None) -> Tensor:
    """Return all rows sparse, then all dense, stacked."""
    own, extra = biases
    both = None if own is None and extra is None else sum(b for b in biases if b is not None)
    parts = zip(weight.split(SIZES), thresholds, strict=True)
    sparse = torch.cat([reference.drop(x, t) @ w.t() for w, t in parts], -1)
    dense = x @ weight.t()
    return torch.stack(
        [sparse if both is None else sparse + both, dense if own is None else dense + own]
    )


@pytest.mark.parametrize("biased", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize(
    "rows", ["s", "d", "sd", "dds", "sss", "ddd", "sdsdsdsdsd" * 3, "d" * 40, "s" * 40]
)
def test_each_row_by_itself(rows: str, biased: tuple[int, int]) -> None:
    x, weight, thresholds, bias, extra = case(len(rows))
    own, other = (b if use else None for b, use in zip((bias, extra), biased, strict=True))
    flags = [row == "s" for row in rows]
    start(*flags)
    found = ops.batch_linear(x, weight, thresholds, SIZES, own, other)
    sparse, dense = expected(x, weight, thresholds, own, other)
    assert_close(found, torch.where(torch.tensor(flags)[:, None], sparse, dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 16), (5, 33), (8, 40), (9, 33), (21, 300)])
@pytest.mark.parametrize("biased", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_sparse_rows_alone_go_straight_to_the_library(
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    biased: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight, thresholds, bias, extra = case(rows, dtype, inputs)
    thresholds[0, 3] = x[0, 3].abs().float()  # at the threshold: kept
    own, other = (b if use else None for b, use in zip((bias, extra), biased, strict=True))
    biases = [[b] if b is not None else [] for b in (own, other)]
    start(*[True] * rows)
    wanted = torch.ops.wina.divided_linear(x, weight, thresholds, SIZES, *biases)
    # A third more columns, of which x is a part: not contiguous.
    apart = torch.cat((x, torch.full((rows, 7), float("nan"), dtype=dtype)), 1)[:, :inputs]
    # In float32 what goes to torch's product passes through Python.
    if dtype != torch.float32:
        monkeypatch.setattr(ops, "_sparse", None)
    for one in (x, apart):
        found = ops.batch_linear(one, weight, thresholds, SIZES, own, other)
        assert torch.equal(found, wanted)
    sparse, _ = expected(x.float(), weight.float(), thresholds, own, other)
    assert_close(found.float(), sparse, rtol=0.02, atol=0.06 if dtype != torch.float32 else 1e-5)


def test_no_library_where_the_reference_is_asked_for() -> None:
    x, weight, thresholds, _, _ = case(3)
    with use_backend("reference"):
        start(True, True, True)
        found = ops.batch_linear(x, weight, thresholds, SIZES, None, None)
    parts = zip(weight.split(SIZES), thresholds, strict=True)
    assert torch.equal(found, torch.cat([reference.sparse_linear(x, w, t) for w, t in parts], -1))


@pytest.mark.parametrize("rows", ["d" * 20, "s" * 20, "ds" * 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_copy_for_dense_products(rows: str, dtype: torch.dtype) -> None:
    x, weight, thresholds, bias, extra = case(len(rows), dtype)
    seen = []

    def product(x: Tensor, part: Tensor) -> Tensor:
        seen.append(len(x))
        return x @ part.t()

    parts = [partial(product, part=part) for part in weight.split(SIZES)]
    packed.remember(weight, parts)
    flags = [row == "s" for row in rows]
    start(*flags)
    found = ops.batch_linear(x, weight, thresholds, SIZES, bias, extra)
    sparse, dense = expected(x, weight, thresholds, bias, extra)
    packed._products.clear()
    assert_close(
        found, torch.where(torch.tensor(flags)[:, None], sparse, dense), rtol=0.02, atol=0.05
    )
    # In float32 sparse rows always skip, so that their bits do not depend on their number.
    kinds = set(rows) if dtype != torch.float32 else set(rows) & {"d"}
    assert len(seen) == len(SIZES) * len(kinds)


def test_options() -> None:
    assert options_of({"wina": {"dense_copy": True}, "other": 1}) == Options(dense_copy=True)
    assert options_of({"wina": {}}) == options_of({}) == Options()
    assert options_of({"wina": {"batch_invariant": True}}).batch_invariant
    with pytest.raises(UsageError, match=r"takes batch_invariant and dense_copy; got"):
        options_of({"wina": {"copy": True}})


def test_padding_is_computed_too() -> None:
    x, weight, thresholds, _, _ = case(5)
    start(False, True)
    found = ops.batch_linear(x, weight, thresholds, SIZES, None, None)
    sparse, dense = expected(x, weight, thresholds, None, None)
    assert_close(found, torch.cat((dense[:1], sparse[1:])))


def test_one_projection() -> None:
    x, weight, thresholds, _, _ = case(3)
    start(True, False, True)
    found = ops.batch_linear(x, weight, thresholds[:1], [sum(SIZES)], None, None)
    masked = reference.drop(x, thresholds[0])
    masked[1] = x[1]
    assert_close(found, masked @ weight.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["s", "sd", "sdsd", "s" * 12, "d" * 12, "sdd" * 20])
def test_a_row_has_the_same_bits_in_any_batch(
    rows: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = 80  # of no other test: the crossover, as WinaLinearMethod sets it, stays set
    x, weight, thresholds, bias, extra = case(len(rows), dtype, inputs)
    for outputs in (*SIZES, sum(SIZES)):
        set_crossover(dtype, inputs, outputs, 1 << 40)
    monkeypatch.setattr(BATCH, "exact", True)
    paired = instruction_set() == "avx512_bf16"
    with use_instruction_set("avx512") if paired else nullcontext():
        check_bits(rows, x, weight, thresholds, bias, extra)


def check_bits(rows: str, x: Tensor, weight: Tensor, thresholds: Tensor, *biases: Tensor) -> None:
    bias, extra = biases
    start(*(row == "s" for row in rows))
    together = ops.batch_linear(x, weight, thresholds, SIZES, bias, extra)
    for place, row in enumerate(rows):
        start(row == "s")
        alone = ops.batch_linear(x[place][None], weight, thresholds, SIZES, bias, extra)
        assert torch.equal(alone[0], together[place])


def test_views_of_a_weight_follow_it_and_do_not_keep_it() -> None:
    x, first, thresholds, *_ = case(1)
    weight = nn.Parameter(first, requires_grad=False)
    start(True)
    before = ops.batch_linear(x, weight, thresholds, SIZES, None, None)
    weight.data = input_major(2 * first)  # as when weights are loaded anew
    thresholds.zero_()
    assert_close(ops.batch_linear(x, weight, thresholds, SIZES, None, None), 2 * x @ first.t())
    assert not torch.equal(before, x @ first.t())
    alive = weakref.ref(weight)
    del weight
    gc.collect()
    assert alive() is None


def test_opaque_to_compile() -> None:
    x, weight, thresholds, bias, extra = case(4)
    compiled = torch.compile(
        lambda x: ops.batch_linear(x, weight, thresholds, SIZES, bias, extra) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    for rows in ((True, True, True, True), (False, True, False, True)):
        start(*rows)
        wanted = ops.batch_linear(x, weight, thresholds, SIZES, bias, extra) * 2
        assert torch.equal(compiled(x), wanted)


def test_fake_and_schema() -> None:
    x, weight, thresholds, bias, extra = case(4)
    start(True, False, True, True)
    arguments = (x, weight, thresholds, SIZES, [bias], [extra])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.wina.batch_linear.default, arguments, test_utils=tests)


@pytest.mark.parametrize("count", [3, 20])
def test_what_a_graph_on_a_gpu_computes(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that looks up the rows on the device, here with the CPU's kernels."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(BATCH, "_on_device", {})
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    x, weight, thresholds, bias, extra = case(count)
    BATCH.prepare(x.device)
    rows = [place % 3 != 1 for place in range(count)]
    start(*rows)
    found = ops._on_cuda(x, weight, thresholds, SIZES, [bias], [extra])
    sparse, dense = expected(x, weight, thresholds, bias, extra)
    assert_close(found, torch.where(torch.tensor(rows)[:, None], sparse, dense))
