"""The CUDA kernel on quantized weights: emulated on the CPU, compiled, and on a device."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.test_quantized import Case
from torch import Tensor
from torch.testing import assert_close

from wina.kernels import QuantizedWeight, quantized_linear, reference
from wina.kernels.cuda import quantized as module
from wina.kernels.cuda.compile import compiled, mapping
from wina.kernels.cuda.quantized import Config, config_for, launch
from wina.kernels.quantized import dequantize

OPS = torch.ops.wina
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
# What PTX or the compiler gives a device, for a CPU.
SHIMS = """
struct alignas(8) uint2 { unsigned x, y; };
static int __dp2a_lo(int a, int b, int c) {
  return c + short(a) * (signed char)(b) + short(a >> 16) * (signed char)(b >> 8);
}
static int __dp2a_hi(int a, int b, int c) { return __dp2a_lo(a, b >> 16, c); }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned order) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i)
    found |= unsigned(both >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
  return found;
}
static int __float2int_rn(float x) { return int(std::nearbyint(x)); }
#define fminf(a, b) std::fmin(a, b)
#define fmaxf(a, b) std::fmax(a, b)
static void fetch_line(const void* address) { emulation::check(address, 1); }
template <class T>
static T __shfl_sync(unsigned, T value, int from) { return emulation::exchange(value, from); }
static unsigned __ballot_sync(unsigned, bool value) {
  return __reduce_add_sync(0, value ? 1u << threadIdx.x % 32 : 0);
}
static int __ffs(unsigned x) { return __builtin_ffs(x); }
template <class T>
static T max(T a, T b) { return a > b ? a : b; }
template <class T>
static T add_of(unsigned members, T value) {
  T sum = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const T other = emulation::exchange(value, lane);
    if (members >> lane & 1) sum += other;
  }
  return sum;
}
static unsigned max_of(unsigned members, unsigned value) {
  unsigned most = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const unsigned other = emulation::exchange(value, lane);
    if (members >> lane & 1) most = max(most, other);
  }
  return most;
}
#define __reduce_add_sync add_of
#define __reduce_max_sync max_of
static float __fdividef(float a, float b) { return a / b; }
static int min(int a, int b) { return a < b ? a : b; }
"""


def case(seed: int, out: int, groups: int, group: int, bits: int, zeros: str, dtype: Any) -> Case:
    return Case(seed, out, groups, group, bits, zeros, dtype, 1, 0.5)


def wanted(x: Tensor, weight: QuantizedWeight, thresholds: Tensor) -> Tensor:
    kept = reference.drop(x, thresholds).double()
    return (kept @ dequantize(weight).double().t()).to(x.dtype)


CONFIGS = {
    "plain": Config(lanes=8, teams=8, unroll=2, cluster=1),
    "wide": Config(lanes=32, teams=2, unroll=1, cluster=2),
    "cluster": Config(lanes=16, teams=8, unroll=3, cluster=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., None]:
    """Return a function that lets the launcher run on the CPU, on these tensors alone."""
    emulated = pytest.importorskip("tests.kernels.test_cuda_emulated")
    sources = folder / "sources"
    if not sources.exists():
        sources.mkdir()
        for name in ("common.cuh", "quantized.cu"):
            text = (Path(module.__file__).parent / name).read_text()
            include = '#include "common.cuh"\n'
            (sources / name).write_text(text.replace(include, include + SHIMS))
    monkeypatch.setattr(emulated, "SOURCES", sources)

    def use(*tensors: Tensor | None) -> None:
        given = [t for t in tensors if t is not None]

        def kernel(source: str, name: str, macros: Any, device: int, threads: int) -> Any:
            library = emulated.build(folder, source, name, macros)
            return emulated.Emulated(library, dict(macros).get("CLUSTER", 1), threads, given)

        monkeypatch.setattr(module, "kernel", kernel)

    return use


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("bits", "zeros"), [(4, "none"), (4, "points"), (4, "minima"), (8, "none"), (8, "points")]
)
def test_emulated(
    emulate: Callable[..., None], bits: int, zeros: str, name: str, dtype: torch.dtype
) -> None:
    for out, groups, group, rows in ((196, 5, 64, 1), (68, 1, 128, 2), (128, 3, 32, 1)):
        one = replace(case(out, out, groups, group, bits, zeros, dtype), rows=rows)
        x, weight, thresholds = one.x() / 16, one.weight(), one.thresholds()
        bias = torch.randn(out).to(dtype)
        emulate(x, *weight, thresholds, bias)
        (found,) = launch(x, [weight], [thresholds], [bias], CONFIGS[name])
        allowed = TOLERANCE[dtype]
        exact = wanted(x, weight, thresholds).double() + bias.double()
        assert_close(found, exact.to(dtype), rtol=allowed, atol=allowed * 8)


def test_float32_is_computed_exactly_instead() -> None:
    one = case(1, 132, 2, 64, 8, "none", torch.float32)
    x, weight, thresholds = one.x(), one.weight(), one.thresholds()
    assert module.fits(x.half(), [weight])
    assert not module.fits(x, [weight])
    (found,) = module.linears(x, [weight], [thresholds], [None])
    assert_close(found, wanted(x, weight, thresholds), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_residual_and_several(emulate: Callable[..., None], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [case(i, out, 3, 64, 4, "points", dtype).weight() for i, out in enumerate((136, 64))]
    x, norm, other = (torch.randn(n).to(dtype)[None] for n in (192, 192, 136))
    thresholds = [torch.full((192,), 0.4), torch.zeros(192)]
    emulate(x, norm, other, *weights[0], *weights[1], *thresholds)
    config = CONFIGS["cluster"]
    extra = {"norm": norm[0], "epsilon": 1e-5, "residual": other}
    found = launch(x, weights, thresholds, [None, None], config, **extra)
    # The norm in the dtype itself: its rounding decides which channels are live.
    normed = reference.rms_norm(x, norm[0], 1e-5).double()
    matrices = [dequantize(w).double() for w in weights]
    exact = reference.fused_linears(normed, None, 0.0, matrices, thresholds)
    exact[0] = exact[0] + other
    for one, two in zip(found, exact, strict=True):
        assert_close(one.double(), two, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_gate_and_up(emulate: Callable[..., None], bits: int) -> None:
    weights = [case(i, 132, 2, 64, bits, "none", torch.float16).weight() for i in range(2)]
    x = torch.randn(1, 128).half() / 64
    thresholds = [torch.full((128,), 0.4 / 64), torch.rand(128) / 64]
    emulate(x, *weights[0], *weights[1], *thresholds)
    (found,) = launch(x, weights, thresholds, [None, None], CONFIGS["wide"], activation="silu")
    gate, up = (wanted(x, w, t) for w, t in zip(weights, thresholds, strict=True))
    exact = torch.nn.functional.silu(gate) * up
    assert_close(found, exact, rtol=TOLERANCE[torch.float16] * 2, atol=TOLERANCE[torch.float16] * 8)


def some_dense(
    x: Tensor,
    weights: list[QuantizedWeight],
    thresholds: list[Tensor],
    biases: list[Tensor | None],
    flags: Tensor,
    extras: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Return what rows of which only those that flags names are sparse give, and their terms."""
    found, terms = [], []
    for weight, vector, *both in zip(weights, thresholds, biases, extras, strict=True):
        bias, extra = (torch.zeros(weight.shape[0]) if x is None else x.cpu() for x in both)
        kept = torch.where(flags[:, None], reference.drop(x, vector), x).double()
        matrix = dequantize(weight).double().t()
        found.append(kept @ matrix + bias.double() + flags[:, None] * extra.double())
        terms.append((kept.square() @ matrix.square()).sqrt())
    return torch.cat(found, -1), torch.cat(terms, -1)


@pytest.mark.parametrize(("bits", "zeros"), [(4, "none"), (4, "points"), (8, "none")])
@pytest.mark.parametrize("tokens", [1, 3])
def test_flags_sparse_biases_and_results_side_by_side(
    emulate: Callable[..., None], bits: int, zeros: str, tokens: int
) -> None:
    dtype, sizes = torch.bfloat16, (136, 64, 68)
    weights = [case(n, n, 3, 64, bits, zeros, dtype).weight() for n in sizes]
    x = replace(case(tokens, 1, 3, 64, bits, zeros, dtype), rows=tokens).x() / 16
    thresholds = [torch.rand(192) * (1 + i) / 16 for i in range(3)]
    biases = [torch.randn(136).to(dtype), None, None]
    extras = [None, torch.randn(64).to(dtype), torch.randn(68).to(dtype)]
    flat = [tensor for weight in weights for tensor in weight]
    for first in (0, 1):
        flags = torch.arange(tokens) % 2 == first
        out = torch.full((tokens, sum(sizes)), float("nan"), dtype=dtype)
        emulate(x, flags, out, *flat, *thresholds, *biases, *extras)
        given = {"flags": flags, "sparse_biases": extras, "out": out}
        launch(x, weights, thresholds, biases, CONFIGS["cluster"], **given)
        wanted, _ = some_dense(x, weights, thresholds, biases, flags, extras)
        allowed = TOLERANCE[dtype]
        assert_close(out, wanted.to(dtype), rtol=allowed, atol=allowed * 8)


def test_what_is_not_finite_is_seen(emulate: Callable[..., None]) -> None:
    one = case(1, 128, 2, 64, 4, "none", torch.bfloat16)
    x, weight = one.x(), one.weight()
    x[0, 3] = float("nan")
    none = torch.zeros(128)
    emulate(x, *weight, none)
    (found,) = launch(x, [weight], [none], [None], CONFIGS["plain"])
    # Outputs whose scale is 0 there too: 0 times NaN.
    assert found.isnan().all()


@pytest.mark.parametrize("gated", [False, True])
def test_a_rule_gives_every_shape_a_configuration(gated: bool) -> None:
    for inputs, outputs in ((4096, (4096, 1024, 1024)), (14336, (4096,)), (576, (1536, 1536))):
        pieces = [-(-out // 128) * 4 for out in outputs]
        config = config_for(inputs, pieces, gated, 132)
        assert config.threads % 32 == 0
        assert 1 <= config.cluster <= 8
        assert config.lanes in module.LANES


def test_the_rule_gives_what_sweeps_found() -> None:
    def found(inputs: int, outputs: tuple[int, ...], bits: int, gated: bool = False) -> Config:
        return config_for(inputs, [out * bits // 128 for out in outputs], gated, 132)

    qkv = (4096, 1024, 1024)
    assert found(4096, (14336, 14336), 4, gated=True) == Config(16, 16, 3, 8, 2)
    assert found(14336, (4096,), 4) == found(4096, qkv, 4) == Config(8, 32, 3, 8, 2)
    assert found(4096, (14336, 14336), 8, gated=True) == Config(32, 8, 3, 8, 2)
    assert found(14336, (4096,), 8) == found(4096, qkv, 8) == Config(16, 16, 3, 8, 2)


@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize(("bits", "zeros"), [(4, 0), (4, 1), (4, 2), (8, 0), (8, 1)])
def test_it_compiles_without_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int, zeros: int, gated: int
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    monkeypatch.setenv("WINA_CACHE", str(tmp_path))
    macros = {"ELEMENT": 2, "SCALE": 2, "BITS": bits, "ZEROS": zeros, "LANES": 8, "TEAMS": 32}
    macros |= {
        "UNROLL": 2,
        "CLUSTER": 2,
        "SEGMENT": 128,
        "ONE": int(bits == 8 and not zeros),
        "GATED": gated,
        "NORM": 1,
    }
    macros["BLOCKS"] = 1 if gated else 2
    try:
        compiled("quantized.cu", mapping(macros), (9, 0))
    except (RuntimeError, ImportError, OSError) as error:
        if not re.search("nvrtc", str(error), re.IGNORECASE):
            raise
        pytest.skip(f"needs the NVRTC library (nvidia-cuda-nvrtc): {error}")


# --- on a device ---


def to_device(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(*(tensor.cuda() for tensor in weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
@pytest.mark.parametrize(
    ("bits", "zeros"), [(4, "none"), (4, "points"), (4, "minima"), (8, "none"), (8, "points")]
)
def test_on_a_device(bits: int, zeros: str, rows: int, dtype: torch.dtype) -> None:
    shapes = ((4096, 32, 128), (1024, 9, 64), (196, 1, 128), (14336, 16, 32), (64, 5, 11))
    for out, groups, group in shapes:
        one = replace(case(out, out, groups, group, bits, zeros, dtype), rows=rows)
        x, weight, thresholds = one.x() / 16, one.weight(), one.thresholds()
        found = quantized_linear(x.cuda(), to_device(weight), thresholds.cuda()).cpu()
        # Roundings of x and of W are relative to the terms of a sum, whatever the sum itself is.
        kept, matrix = reference.drop(x, thresholds).double(), dequantize(weight).double()
        terms = (kept.square() @ matrix.square().t()).sqrt()
        error = (found.double() - kept @ matrix.t()).abs()
        assert (error <= TOLERANCE[dtype] * (terms + found.double().abs() + 1e-3)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gated_mlp_on_a_device(bits: int) -> None:
    shapes = ((352, 2, 64), (352, 2, 64), (128, 11, 32))
    weights = [case(i, *s, bits, "points", torch.float32).weight() for i, s in enumerate(shapes)]
    flat = [tensor for weight in weights for tensor in weight]
    x, norm = torch.randn(1, 1, 128), torch.rand(128)
    thresholds = [torch.full((128,), 0.3), torch.rand(128), torch.full((352,), 0.2)]
    arguments = ([norm], 1e-5, flat, thresholds, "silu", [], [x])
    exact = reference.fused_gated_mlp(
        x, norm, 1e-5, [dequantize(w) for w in weights], thresholds, "silu", None, x
    )
    moved = [[t.cuda() for t in part] if isinstance(part, list) else part for part in arguments]
    found = OPS.quantized_gated_mlp(x.cuda(), *moved)
    assert_close(found.cpu(), exact, rtol=1e-3, atol=1e-2)


SHAPES = {  # outputs of each projection, groups, inputs of a group
    "qkv": ((4096, 1024, 1024), 32, 128),
    "gate and up": ((14336, 14336), 32, 128),
    "down": ((4096,), 112, 128),
    "odd": ((196, 68, 64), 9, 64),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("bits", "zeros"), [(4, "none"), (4, "points"), (8, "none"), (8, "points")]
)
def test_rows_of_which_some_are_dense_on_a_device(
    bits: int, zeros: str, shape: str, rows: int, dtype: torch.dtype
) -> None:
    """One launch for all projections, also captured, where the mix is another in each replay."""
    from wina.kernels.gpu import flagged_quantized_linears

    torch.manual_seed(rows)
    sizes, groups, group = SHAPES[shape]
    weights = [case(n, n, groups, group, bits, zeros, dtype).weight() for n in sizes]
    x = replace(case(rows, 1, groups, group, bits, zeros, dtype), rows=rows).x() / 16
    thresholds = list((torch.rand(len(sizes), groups * group) * 0.1).unbind())
    biases: list[Tensor | None] = [torch.randn(n).to(dtype) for n in sizes]
    extras: list[Tensor | None] = [torch.randn(n).to(dtype) for n in sizes]
    biases[0] = extras[-1] = None
    on_device, moved = x.cuda(), [to_device(weight) for weight in weights]
    vectors = [vector.cuda() for vector in thresholds]
    own, more = ([None if b is None else b.cuda() for b in each] for each in (biases, extras))
    place = torch.ones(rows, dtype=torch.bool, device="cuda")

    def run() -> Tensor:
        found = flagged_quantized_linears(on_device, moved, vectors, own, place, more)
        assert found is not None
        return found

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for flags in (torch.rand(rows) > 0.5, torch.zeros(rows).bool(), torch.ones(rows).bool()):
        place.copy_(flags)
        wanted, terms = some_dense(x, weights, thresholds, biases, flags, extras)
        allowed = TOLERANCE[dtype] * (terms + wanted.abs() + 1e-3)
        assert ((run().cpu().double() - wanted).abs() <= allowed).all()
        graph.replay()
        assert ((captured.cpu().double() - wanted).abs() <= allowed).all()
