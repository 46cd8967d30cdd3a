"""The GPU kernels against the reference; on a CUDA device only: pytest -m gpu."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from wina.kernels import available_backends, decode_attention, reference, use_backend
from wina.kernels.cuda import table
from wina.kernels.cuda.rows import Config, rows
from wina.kernels.cuda.tune import tune
from wina.kernels.measured import device_kind
from wina.kernels.shapes import Shape

pytestmark = pytest.mark.gpu

GPU = [name for name in ("cuda", "triton") if name in available_backends()]
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3.2e-2, "atol": 3.2e-2},
}
SHAPES = [(8, 8), (64, 40), (576, 1536), (1536, 576), (4096, 1032), (14336, 512), (264, 4104)]


@pytest.fixture(params=GPU)
def backend(request: pytest.FixtureRequest) -> str:
    with use_backend(request.param):
        yield request.param


def weight(inputs: int, outputs: int, dtype: torch.dtype) -> Tensor:
    made = torch.randn(inputs, outputs, device="cuda") / max(inputs, 1) ** 0.5
    return made.to(dtype).t()


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def pack(x: Tensor, biases: list[Tensor | None]) -> list[Tensor]:
    return [x.new_empty(0) if bias is None else bias for bias in biases]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_linear(backend: str, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens * inputs + outputs)
    x = torch.randn(tokens, inputs, device="cuda").to(dtype)
    w, bias = weight(inputs, outputs, dtype), torch.randn(outputs, device="cuda").to(dtype)
    for level in (0.0, 1.3, float("inf")):
        t = torch.full((inputs,), level, device="cuda")
        if level == 1.3:
            t *= torch.rand_like(t)
        found = torch.ops.wina.sparse_linear(x, w, t, [bias])
        wanted = reference.sparse_linear(*wide(x, w, t, bias)).to(dtype)
        assert_close(found, wanted, **TOLERANCE[dtype])
        assert torch.equal(found, torch.ops.wina.sparse_linear(x, w, t, [bias]))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("outputs", [[64], [576, 192, 192], [40, 1032], [4096, 1024, 1024]])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("normed", "added"), [(False, True), (True, False)])
def test_fused_linears(
    backend: str, tokens: int, outputs: list[int], normed: bool, added: bool, dtype: torch.dtype
) -> None:
    inputs = 576 if outputs[0] < 4096 else 4096
    torch.manual_seed(tokens + sum(outputs))
    x = 3 * torch.randn(1, tokens, inputs, device="cuda").to(dtype)
    weights = [weight(inputs, n, dtype) for n in outputs]
    thresholds = [torch.rand(inputs, device="cuda") * (1 + i) for i in range(len(outputs))]
    biases = [torch.randn(n, device="cuda").to(dtype) if n != 192 else None for n in outputs]
    norm = [1 + torch.rand(inputs, device="cuda").to(dtype)] if normed else []
    residual = [torch.randn(1, tokens, outputs[0], device="cuda").to(dtype)] if added else []
    arguments = (x, norm, 1e-5, weights, thresholds)
    found = torch.ops.wina.fused_linears(*arguments, pack(x, biases), residual)
    # The norm in the dtype itself: its rounding decides which channels are live.
    before = reference.rms_norm(x, norm[0], 1e-5) if normed else x
    wanted = [
        reference.sparse_linear(*wide(before, w, t, b)).to(dtype)
        for w, t, b in zip(weights, thresholds, biases, strict=True)
    ]
    if added:
        wanted[0] = wanted[0] + residual[0]
    for one, other in zip(found, wanted, strict=True):
        # A sum in another order can round the norm's factor otherwise: a channel may flip.
        wrong = (one - other).float().abs() > 4 * TOLERANCE[dtype]["atol"] * (1 + other.abs())
        assert wrong.float().mean() <= (0.02 if normed else 0.0)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("tokens", "activation", "shape"),
    [
        *((1, name, (64, 48)) for name in sorted(reference.ACTIVATIONS)),
        *((n, "silu", shape) for n in (1, 2, 20) for shape in ((576, 1536), (4096, 14336))),
    ],
    ids=str,
)
def test_gated_mlp(
    backend: str, tokens: int, activation: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs, inner = shape
    torch.manual_seed(tokens + inner)
    x = torch.randn(tokens, inputs, device="cuda").to(dtype)
    weights = [weight(inputs, inner, dtype), weight(inputs, inner, dtype)]
    weights.append(weight(inner, inputs, dtype))
    thresholds = [torch.rand(n, device="cuda") * s for n, s in ((inputs, 1), (inputs, 2))]
    residual = torch.randn(tokens, inputs, device="cuda").to(dtype)
    # The last gate reads what the first two computed, where rounding may flip channels.
    for last in (0.0, 0.2):
        t = [*thresholds, torch.full((inner,), last, device="cuda")]
        found = torch.ops.wina.fused_gated_mlp(x, [], 0.0, weights, t, activation, [], [residual])
        wanted = reference.fused_gated_mlp(x, None, 0.0, weights, t, activation, None, residual)
        error = (found - wanted).float().norm() / (wanted - residual).float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2) + (1e-2 if last else 0)


CONFIGS = [
    Config(16, 32, unroll=8, loads=2),
    Config(16, 32, unroll=8, loads=1, prefetch=256),
    Config(16, 32, unroll=4, loads=0, prefetch=128),
    Config(8, 64, unroll=4, cluster=2, loads=2),
    Config(14, 36, unroll=6, cluster=4, loads=2),
    Config(32, 8, unroll=6, cluster=8, loads=1),
    Config(64, 4, unroll=4, cluster=4, blocks=1, loads=0),
    Config(8, 48, unroll=4, cluster=2, blocks=3, loads=1, whole=1),
    Config(32, 16, unroll=4, cluster=8, loads=0, whole=1),
    Config(16, 24, unroll=4, cluster=7, blocks=3, loads=0, far=1),
    Config(16, 32, unroll=4, cluster=3, loads=1, whole=1, far=1),
]


@pytest.mark.skipif("cuda" not in GPU, reason="the CUDA backend does not run here")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_configurations(config: Config, tokens: int) -> None:
    torch.manual_seed(tokens)
    dtype, inputs, outputs = torch.bfloat16, 2056, 1032
    config = replace(config, blocks=1)
    x = torch.randn(tokens, inputs, device="cuda").to(dtype)
    w = [weight(inputs, outputs, dtype), weight(inputs, outputs, dtype)]
    t = [torch.rand(inputs, device="cuda"), 2 * torch.rand(inputs, device="cuda")]
    norm = torch.ones(inputs, device="cuda", dtype=dtype)
    found = rows(x, w, t, [None, None], config)
    wanted = [reference.sparse_linear(*wide(x, a, b)).to(dtype) for a, b in zip(w, t, strict=True)]
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, **TOLERANCE[dtype])
    for _ in range(3):  # the same bits each time
        assert all(map(torch.equal, rows(x, w, t, [None, None], config), found))
    if tokens > 4:  # the compiler would take half a minute
        return
    (gated,) = rows(x, w, t, [None, None], config, activation="silu", norm=norm, epsilon=1e-5)
    normed = reference.rms_norm(x, norm, 1e-5)
    gate, up = (reference.sparse_linear(*wide(normed, a, b)) for a, b in zip(w, t, strict=True))
    error = (gated - torch.nn.functional.silu(gate) * up).norm() / gated.float().norm()
    assert error < 2e-2


@pytest.mark.skipif("cuda" not in GPU, reason="the CUDA backend does not run here")
def test_launches_that_overlap_wait_for_each_other() -> None:
    """A chain captured in a graph gives the bits that single launches give."""
    torch.manual_seed(0)
    size, dtype = 2048, torch.bfloat16
    x = torch.randn(1, size, device="cuda").to(dtype)
    weights = [weight(size, size, dtype) for _ in range(8)]
    t = torch.full((size,), 0.6, device="cuda")
    norm = [torch.ones(size, device="cuda", dtype=dtype)]

    def chain(x: Tensor, each: Callable[[], object]) -> list[Tensor]:
        found = []
        for i in range(40):
            w = weights[i % 8]
            if i % 3 == 0:
                arguments = (x, norm, 1e-5, [w, w, w], [t, t, t], "silu", [], [x])
                x = torch.ops.wina.fused_gated_mlp(*arguments)
            else:
                x = torch.ops.wina.fused_linears(x, norm, 1e-5, [w], [t], [], [x])[0]
            each()
            found.append(x)
        return found

    with use_backend("cuda"):
        chain(x, torch.cuda.synchronize)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = chain(x, lambda: None)
        for seed in range(10):
            torch.manual_seed(seed)
            x.copy_(torch.randn_like(x))
            graph.replay()
            wanted = chain(x, torch.cuda.synchronize)
            assert all(map(torch.equal, found, wanted))


@pytest.mark.skipif("cuda" not in GPU, reason="the CUDA backend does not run here")
@pytest.mark.parametrize("loads", [0, 1, 2])
@pytest.mark.parametrize("cluster", [1, 2])
def test_small_for_sanitizers(loads: int, cluster: int) -> None:
    """Little of everything: compute-sanitizer python -m pytest -m gpu -k for_sanitizers."""
    torch.manual_seed(loads)
    dtype = torch.bfloat16
    config = Config(4, 16, unroll=2, cluster=cluster, loads=loads, whole=int(loads == 1))
    for tokens in (1, 3):
        x = torch.randn(tokens, 264, device="cuda").to(dtype)
        w, t = [weight(264, 72, dtype) for _ in range(2)], [torch.rand(264, device="cuda")] * 2
        norm, residual = torch.ones(264, device="cuda", dtype=dtype), x[:, :72].contiguous()
        found = rows(x, w, t, [None, None], config, residual=residual)
        wanted = reference.fused_linears(x, None, 0.0, w, t, None, residual)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, **TOLERANCE[dtype])
        rows(x, w, t, [None, None], config, activation="gelu", norm=norm, epsilon=1e-5)
    query = torch.randn(1, 4, 1, 64, device="cuda").to(dtype)
    cache = torch.randn(2, 1, 2, 300, 64, device="cuda").to(dtype)
    mask = (torch.arange(300, device="cuda") < 200)[None, None, None]
    with use_backend("cuda"):
        found = decode_attention(query, cache[0], cache[1], mask, 0.125)
        x = torch.randn(9, 264, device="cuda").to(dtype)
        torch.ops.wina.sparse_linear(x, w[0], t[0], [])
        new = torch.randn(2, 1, 2, 1, 64, device="cuda").to(dtype)
        turn = torch.randn(2, 1, 1, 64, device="cuda").to(dtype)
        length = torch.tensor(222, device="cuda")
        torch.ops.wina.attention_step(query, *new, *turn, *cache, length, mask, 0.125)
    wanted = reference.decode_attention(query, cache[0], cache[1], mask, 0.125)
    assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_masks_equal_the_references(backend: str) -> None:
    # With W = 1 the output is the masked input itself.
    x = torch.randn(1, 512, device="cuda").bfloat16()
    x[0, 5], x[0, 6], x[0, 7] = float("nan"), float("inf"), -0.0
    t = x[0].float().abs().nan_to_num(1.0).roll(1)
    t[::3] = x[0].float().abs()[::3].nan_to_num(1.0)  # exactly at the threshold: kept
    eye = torch.eye(512, device="cuda").bfloat16()
    clean = torch.where(x.isfinite(), x, 2.0)
    found = torch.ops.wina.sparse_linear(clean, eye.t(), t, [])
    assert torch.equal(found, reference.drop(clean, t))
    assert torch.ops.wina.sparse_linear(x, eye.t(), t.new_full((512,), 1e30), []).isnan().all()
    nothing = torch.ops.wina.sparse_linear(clean, eye.t(), t.new_full((512,), torch.inf), [])
    assert not nothing.any()


def test_layouts_that_kernels_cannot_skip(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 30, device="cuda").t()[:, :2].t()  # not contiguous
    t = torch.rand(30, device="cuda")
    for w in (weight(30, 17, torch.float32), torch.randn(17, 30, device="cuda")):
        found = torch.ops.wina.sparse_linear(x, w, t, [])
        assert_close(found, reference.sparse_linear(x, w, t), rtol=1e-4, atol=1e-4)
    empty = torch.ops.wina.sparse_linear(x[:0], w, t, [])
    assert empty.shape == (0, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 64), (9, 3, 64), (32, 8, 128), (28, 4, 128), (4, 1, 256)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("positions", "filled"), [(256, 1), (256, 200), (1024, 777), (8448, 8192)])
def test_attention(
    backend: str,
    heads: tuple[int, int, int],
    batch: int,
    positions: int,
    filled: int,
    dtype: torch.dtype,
) -> None:
    count, shared, size = heads
    torch.manual_seed(positions + filled)
    query = torch.randn(batch, 1, count, size, device="cuda").to(dtype).transpose(1, 2)
    key, value = (
        torch.randn(batch, shared, positions, size, device="cuda").to(dtype) for _ in range(2)
    )
    mask = (torch.arange(positions, device="cuda") < filled)[None, None, None]
    if positions == 1024:
        mask = mask & (torch.rand(batch, 1, 1, positions, device="cuda") > 0.3)
    found = decode_attention(query, key, value, mask, size**-0.5)
    wanted = reference.decode_attention(*wide(query, key, value), mask, size**-0.5)
    assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("heads", "turned"),
    [
        ((4, 4, 64), 64),
        ((9, 3, 64), 64),
        ((32, 8, 128), 128),
        ((28, 4, 128), 96),
        ((40, 10, 96), 96),
    ],
)
@pytest.mark.parametrize(("positions", "batch"), [(256, 1), (768, 3), (4352, 1), (8448, 2)])
def test_attention_step(
    backend: str,
    heads: tuple[int, int, int],
    turned: int,
    positions: int,
    batch: int,
    dtype: torch.dtype,
) -> None:
    """Several steps in a row, captured in a graph: the reference's cache to the bit."""
    count, shared, size = heads
    torch.manual_seed(positions)
    filled = (3 * positions // 4, 0, 1, positions - 4)[torch.randint(4, ()).item()]
    projected = torch.randn(4, batch, 1, (count + 2 * shared) * size, device="cuda").to(dtype)
    turns = torch.randn(2, 4, 1, 1, turned, device="cuda").to(dtype)
    cache = [torch.randn(batch, shared, positions, size, device="cuda").to(dtype) for _ in "kv"]
    for part in cache:
        part[:, :, filled:] = 0
    other = [part.clone() for part in cache]
    length = torch.tensor(filled, device="cuda")
    mask = torch.rand(batch, 1, 1, positions, device="cuda") > 0.2

    def run(step: Callable[..., Tensor], cache: list[Tensor]) -> list[Tensor]:
        found = []
        for i in range(4):
            split = projected[i].split([count * size, shared * size, shared * size], -1)
            parts = [part.view(batch, 1, -1, size).transpose(1, 2) for part in split]
            found.append(step(*parts, *turns[:, i], *cache, length, mask, size**-0.5))
            length.add_(1)
        length.sub_(4)
        return found

    run(torch.ops.wina.attention_step, [part.clone() for part in cache])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(torch.ops.wina.attention_step, cache)
    graph.replay()
    first = [one.clone() for one in found]
    graph.replay()
    assert all(map(torch.equal, found, first))
    wanted = run(reference.attention_step, other)
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    for one, two in zip(cache, other, strict=True):
        assert_close(one, two, **close)
    for one, two in zip(found, wanted, strict=True):
        assert_close(one, two, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("vocabulary", [320, 1001, 49_152, 128_256])
def test_most_likely(backend: str, vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, vocabulary, device="cuda").to(dtype)
    logits[1], logits[2, ::7], logits[3, 300:] = 0.0, 9.0, torch.nan
    assert torch.equal(torch.ops.wina.most_likely(logits), logits.argmax(-1))


def test_opcheck_and_capture(backend: str) -> None:
    x = torch.randn(1, 64, device="cuda").bfloat16()
    w, t = weight(64, 48, torch.bfloat16), torch.rand(64, device="cuda")
    torch.library.opcheck(torch.ops.wina.sparse_linear.default, (x, w, t, []))
    arguments = (x, [x[0].clone()], 1e-5, [w, w], [t, t], [], [])
    torch.library.opcheck(torch.ops.wina.fused_linears.default, arguments)
    torch.ops.wina.sparse_linear(x, w, t, [])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.wina.sparse_linear(x, w, t, [])
        z = torch.ops.wina.sparse_linear(y, w[:, :48], t[:48].contiguous(), [])
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        first = torch.ops.wina.sparse_linear(x, w, t, [])
        assert torch.equal(y, first)
        again = torch.ops.wina.sparse_linear(first, w[:, :48], t[:48].contiguous(), [])
        assert torch.equal(z, again)


@pytest.mark.skipif("cuda" not in GPU, reason="the CUDA backend does not run here")
def test_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path))
    shape, seen = Shape(512, (640, 128), normed=True), []
    chosen = tune(shape, 1, torch.bfloat16, log=lambda key, config, times: seen.append(times))
    assert len(seen) > 8
    assert all(time > 0 for times in seen for time in times.values())
    try:
        table.TABLE.remember(device_kind(0), {shape.key(1, torch.bfloat16): chosen})
        x = torch.randn(1, 512, device="cuda").bfloat16()
        assert table.config_for(x, (640, 128), gated=False) == chosen
    finally:
        table.TABLE.forget()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 4, 9, 17, 32, 64])
@pytest.mark.parametrize(
    ("inputs", "sizes"), [(1096, (640, 72, 72)), (2048, (512, 512)), (512, (64,))]
)
def test_rows_of_which_some_are_dense(
    rows: int, inputs: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """One launch for all projections, also captured, where its tickets must come back to 0."""
    from wina.kernels.gpu import flagged_linears
    from wina.kernels.triton.product import Cut, masked_product

    torch.manual_seed(rows)
    x = torch.randn(rows, inputs, device="cuda").to(dtype)
    whole = (torch.randn(inputs, sum(sizes), device="cuda") / inputs**0.5).to(dtype).t()
    weights = list(torch.split(whole, sizes))
    thresholds = torch.rand(len(sizes), inputs, device="cuda")
    biases = [torch.randn(n, device="cuda").to(dtype) for n in sizes]
    flags = torch.rand(rows, device="cuda") > 0.5

    def run() -> torch.Tensor:
        vectors = thresholds.unbind()
        found = flagged_linears(x, weights, vectors, biases, flags, biases)
        if found is None:  # masked copies serve there; the product computes the same
            found = x.new_empty(rows, sum(sizes))
            options = {"flags": flags, "sparse_biases": biases, "out": found}
            masked_product(x, weights, vectors, biases, **options, cut=Cut(64, 32, 2))
        return found

    parts = []
    for w, t, b in zip(weights, thresholds, biases, strict=True):
        kept = torch.where(flags[:, None] & (x.abs().float() < t), 0, x).float()
        parts.append(kept @ w.float().t() + b.float() * (1 + flags[:, None].float()))
    wanted = torch.cat(parts, -1)
    first = run()
    assert_close(first.float(), wanted, rtol=2e-2, atol=2e-2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = run()
    for _ in range(3):
        again.zero_()
        graph.replay()
        assert torch.equal(again, first)
