"""The CUDA kernels' own source, run thread by thread on the CPU, against the reference.

What it can't show: that the PTX in common.cuh does what emulation.h takes it to do, and speed.
tests/kernels/test_gpu.py runs on a device.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from wina.kernels import reference, tickets
from wina.kernels.cuda import attention as attention_module
from wina.kernels.cuda import likely as likely_module
from wina.kernels.cuda import rows as rows_module
from wina.kernels.cuda.compile import SHARED, SOURCES
from wina.kernels.cuda.rows import TOKENS, Config

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HERE = Path(__file__).parent
gate_module = import_module("wina.kernels.cuda.gate")  # the package has a function of that name
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


class Emulated:
    """As wina.kernels.cuda.compile.Kernel, on tensors of the CPU."""

    def __init__(self, library: Path, cluster: int, threads: int, tensors: list[Tensor]) -> None:
        self.run = ctypes.CDLL(str(library)).launch
        self.cluster, self.threads, self.tensors = cluster, threads, tensors

    def launch(self, blocks: int, shared: int, arguments: ctypes.Structure) -> None:
        ranges = [
            (t.data_ptr(), t.untyped_storage().nbytes() - t.storage_offset() * t.element_size())
            for t in (*self.tensors, tickets.of_device(torch.device("cpu")))
        ]
        memory = (ctypes.c_longlong * (2 * len(ranges)))(*(x for pair in ranges for x in pair))
        sizes = (blocks, self.threads, self.cluster, shared)
        self.run(*sizes, ctypes.byref(arguments), memory, len(ranges))


def build(folder: Path, source: str, name: str, macros: tuple[tuple[str, int], ...]) -> Path:
    """Return a library of a kernel for the CPU; what is PTX comes from emulation.h."""
    place = folder / re.sub(r"\W+", "_", f"{source} {macros}")
    library = place / "kernel.so"
    if library.exists():
        return library
    place.mkdir()
    blocks = (SOURCES / SHARED).read_text().split("\n\n")
    plain = [block for block in blocks if "asm" not in block and "typedef" not in block]
    (place / SHARED).write_text("\n\n".join(plain))
    dynamic = r"extern __shared__ __align__\(16\) (\w+) (\w+)\[\];"
    text = (SOURCES / source).read_text()
    text, found = re.subn(dynamic, r"\1* \2 = reinterpret_cast<\1*>(emulation::memory());", text)
    assert found or "extern __shared__" not in text
    (place / "kernel.cu").write_text(text)
    flags = [f"-D{key}={value}" for key, value in (*macros, ("KERNEL", name))]
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", *flags]
    command += ["-I", str(place), "-x", "c++", str(HERE / "emulation.h"), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., None]:
    """Return a function that lets the launchers run on the CPU, on these tensors alone."""

    def use(*tensors: Tensor | None) -> None:
        given = [t for t in tensors if t is not None]

        def kernel(source: str, name: str, macros: Any, device: int, threads: int) -> Emulated:
            library = build(folder, source, name, macros)
            return Emulated(library, dict(macros).get("CLUSTER", 1), threads, given)

        for module in (rows_module, attention_module, gate_module, likely_module):
            monkeypatch.setattr(module, "kernel", kernel)

    return use


def weight(inputs: int, outputs: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(inputs, outputs) / inputs**0.5).to(dtype).t()


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


CONFIGS = {
    "small": Config(lanes=4, groups=8, unroll=2, cluster=1, loads=0),
    "odd": Config(lanes=6, groups=5, unroll=3, cluster=2, loads=1),
    "copies": Config(lanes=8, groups=8, unroll=4, cluster=1, loads=2),
    "cluster": Config(lanes=8, groups=4, unroll=2, cluster=4, loads=2),
    "whole": Config(lanes=4, groups=16, unroll=3, cluster=4, loads=1, whole=1),
    "far": Config(lanes=8, groups=4, unroll=2, cluster=3, loads=1, far=1),
    "wide": Config(lanes=32, groups=2, unroll=4, cluster=2, loads=1, ahead=20),
}


# Each is compiled, so not all pairs: every dtype, every configuration. A device runs more of them.
CASES = [
    *(("small", dtype) for dtype in DTYPES),
    ("odd", torch.bfloat16),
    ("copies", torch.float16),
    ("cluster", torch.bfloat16),
    ("far", torch.bfloat16),
    ("whole", torch.float32),
    ("wide", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_rows(emulate: Callable[..., None], name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    torch.manual_seed(len(name))
    for tokens in (1, 3):
        for inputs, outputs in ((264, 120), (8, 8)) if tokens == 1 else ((136, 72),):
            x, w = torch.randn(tokens, inputs).to(dtype), weight(inputs, outputs, dtype)
            bias = torch.randn(outputs).to(dtype)
            for level in (0.0, 1.0, float("inf")):
                t = torch.full((inputs,), level)
                if level == 1.0:
                    t *= 2 * torch.rand(inputs)
                    t[::5] = x[0, ::5].float().abs()  # exactly at the threshold: kept
                emulate(x, w, t, bias)
                (found,) = rows_module.rows(x, [w], [t], [bias], config)
                wanted = reference.sparse_linear(*wide(x, w, t, bias)).to(dtype)
                allowed = TOLERANCE[dtype]
                assert_close(found, wanted, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("loads", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 2])
def test_norm_residual_and_several_projections(
    emulate: Callable[..., None], tokens: int, loads: int
) -> None:
    torch.manual_seed(tokens + loads)
    dtype, inputs, outputs = torch.bfloat16, 200, (120, 40, 48)
    x, norm = 3 * torch.randn(1, tokens, inputs).to(dtype), 1 + torch.rand(inputs).to(dtype)
    weights = [weight(inputs, n, dtype) for n in outputs]
    thresholds = [torch.rand(inputs) * (1 + i) for i in range(3)]
    biases = [torch.randn(outputs[0]).to(dtype), None, torch.randn(outputs[2]).to(dtype)]
    residual = torch.randn(1, tokens, outputs[0]).to(dtype)
    whole = int(loads > 0)  # where there are several rows, it does not apply
    config = Config(lanes=4, groups=8, unroll=4, cluster=2, loads=loads, whole=whole)
    emulate(x, norm, residual, *weights, *thresholds, *biases)
    found = rows_module.rows(
        x, weights, thresholds, biases, config, norm=norm, epsilon=1e-5, residual=residual
    )
    wanted = reference.fused_linears(x, norm, 1e-5, weights, thresholds, biases, residual)
    for one, other in zip(found, wanted, strict=True):
        wrong = (one - other).float().abs() > 0.05 * (1 + other.float().abs())
        assert wrong.float().mean() <= 0.02  # a norm rounded otherwise can flip a channel


@pytest.mark.parametrize("loads", [0, 1, 2])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.9), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_gated(emulate: Callable[..., None], shares: tuple[float, float], loads: int) -> None:
    """Both lists in one walk, of like and unlike lengths, also empty."""
    torch.manual_seed(loads)
    dtype, inputs, outputs = torch.float32, 404, 44
    x = torch.rand(1, inputs).to(dtype)
    weights = [weight(inputs, outputs, dtype), weight(inputs, outputs, dtype)]
    thresholds = [torch.full((inputs,), share) for share in shares]
    biases = [torch.randn(outputs), None]
    config = Config(lanes=4, groups=8, unroll=3, cluster=2, loads=loads, whole=int(loads < 2))
    emulate(x, *weights, *thresholds, *biases)
    options = {"activation": "silu"}
    (found,) = rows_module.rows(x, weights, thresholds, biases, config, **options)
    gate, up = reference.sparse_linears(x, weights, thresholds, biases)
    assert_close(found, torch.nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_activations(emulate: Callable[..., None], activation: str) -> None:
    torch.manual_seed(0)
    x, w = 2 * torch.randn(2, 64), [weight(64, 32, torch.float32) for _ in range(2)]
    t = [torch.rand(64), torch.rand(64)]
    emulate(x, *w, *t)
    config = Config(lanes=8, groups=4, unroll=2, loads=1)
    (found,) = rows_module.rows(x, w, t, [None, None], config, activation=activation)
    gate, up = reference.sparse_linears(x, w, t, None)
    assert_close(found, reference.ACTIVATIONS[activation](gate) * up, rtol=1e-4, atol=1e-4)


def test_rounds_of_a_long_input(emulate: Callable[..., None]) -> None:
    """More channels than the threads gate at once."""
    torch.manual_seed(0)
    inputs = 32 * 8 * 4 * 2 + 136
    x, w = torch.randn(1, inputs).half(), weight(inputs, 40, torch.float16)
    t = torch.rand(inputs)
    emulate(x, w, t)
    for cluster, whole in ((1, 0), (2, 0), (2, 1)):  # too long for one round: as if not whole
        config = Config(lanes=4, groups=8, unroll=4, cluster=cluster, loads=1, whole=whole)
        (found,) = rows_module.rows(x, [w], [t], [None], config)
        assert_close(found, reference.sparse_linear(*wide(x, w, t)).half(), rtol=4e-3, atol=4e-3)


def test_equal_shares_of_several_chunks(emulate: Callable[..., None]) -> None:
    """Each thread gates several chunks; fewer live channels than blocks, none, all."""
    torch.manual_seed(0)
    inputs = 32 * 8 * 3 + 40
    x, w = torch.randn(1, inputs).half(), weight(inputs, 40, torch.float16)
    config = Config(lanes=4, groups=8, unroll=4, cluster=8, loads=0, whole=1)
    for live in (0, 1, 3, inputs // 2, inputs):
        t = torch.full((inputs,), torch.inf)
        t[torch.randperm(inputs)[:live]] = 0
        emulate(x, w, t)
        (found,) = rows_module.rows(x, [w], [t], [None], config)
        assert_close(found, reference.sparse_linear(*wide(x, w, t)).half(), rtol=4e-3, atol=4e-3)


def test_nan_inf_and_zero(emulate: Callable[..., None]) -> None:
    x = torch.randn(1, 64)
    x[0, 5], x[0, 6], x[0, 7] = float("nan"), float("inf"), -0.0
    w, everything = torch.eye(64).t(), torch.full((64,), 1e30)
    run = partial(rows_module.rows, config=Config(lanes=8, groups=4, unroll=2, loads=1))
    emulate(x, w, everything)
    assert run(x, [w], [everything], [None])[0].isnan().all()
    x[0, 5] = 1.0
    nothing = torch.full((64,), torch.inf)
    emulate(x, w, nothing)
    assert run(x, [w], [nothing], [None])[0].isnan().any()  # an infinity is never dropped
    x[0, 6] = 1.0
    assert not run(x, [w], [nothing], [None])[0].any()


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((4, 4, 32), torch.float32), ((6, 2, 64), torch.bfloat16), ((6, 2, 64), torch.float16)],
    ids=str,
)
@pytest.mark.parametrize(("positions", "filled"), [(70, 1), (300, 222)])
def test_attention(
    emulate: Callable[..., None],
    heads: tuple[int, int, int],
    positions: int,
    filled: int,
    dtype: torch.dtype,
) -> None:
    count, shared, size = heads
    torch.manual_seed(positions)
    query = torch.randn(2, 1, count, size).to(dtype).transpose(1, 2)
    key, value = (torch.randn(2, shared, positions, size).to(dtype) for _ in range(2))
    mask = (torch.arange(positions) < filled)[None, None, None]
    if filled > 1:
        mask = mask & (torch.rand(2, 1, 1, positions) > 0.3)
    emulate(query, key, value, mask)
    found = attention_module.decode_attention(query, key, value, mask, size**-0.5)
    wanted = reference.decode_attention(*wide(query, key, value), mask, size**-0.5)
    assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2)


STEPS = [
    # heads, key heads, size, rotated; positions, of which filled
    (torch.float32, (4, 4, 32, 32), (70, 0)),
    (torch.float32, (4, 4, 32, 16), (70, 69)),
    (torch.bfloat16, (6, 2, 64, 64), (300, 222)),
    (torch.float16, (6, 2, 64, 32), (1200, 1111)),
    (torch.bfloat16, (8, 1, 32, 32), (1200, 1026)),
]


@pytest.mark.parametrize(("dtype", "heads", "positions"), STEPS, ids=str)
def test_attention_step(
    emulate: Callable[..., None],
    heads: tuple[int, int, int, int],
    positions: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """The cache to the bit, the result within rounding; the mask has holes, also at the end."""
    count, shared, size, turned = heads
    most, filled = positions
    torch.manual_seed(most)
    batch = 2 if most < 1000 else 1
    projected = torch.randn(batch, 1, (count + 2 * shared) * size).to(dtype)
    parts = projected.split([count * size, shared * size, shared * size], -1)
    query, key, value = (part.view(batch, 1, -1, size).transpose(1, 2) for part in parts)
    cos, sin = (torch.randn(batch, 1, turned).to(dtype) for _ in range(2))
    cache = [torch.randn(batch, shared, most, size).to(dtype) for _ in range(2)]
    cache[0][:, :, filled:] = torch.nan  # never read
    wanted_cache = [part.clone() for part in cache]
    mask = torch.rand(batch, 1, 1, most) > 0.3
    length = torch.tensor(filled)
    if dtype == torch.float32:
        length = length[None]
    arguments = (query, key, value, cos, sin)
    emulate(projected, cos, sin, *cache, mask, length)
    found = attention_module.attention_step(*arguments, *cache, length, mask, 0.2)
    reference.attention_step(*arguments, *wanted_cache, length, mask, 0.2)
    for one, other in zip(cache, wanted_cache, strict=True):
        close = 1e-6 if dtype == torch.float32 else 0
        assert_close(one, other, rtol=close, atol=close, equal_nan=True)
    seen = mask & (torch.arange(most) < filled) | (torch.arange(most) == filled)
    q = reference.rotated(query, cos, sin)
    wanted = reference.decode_attention(
        *wide(q, *(part.nan_to_num() for part in wanted_cache)), seen, 0.2
    )
    allowed = TOLERANCE[dtype]
    assert_close(found.double(), wanted, rtol=allowed, atol=allowed)


def test_a_full_cache_is_left_alone(emulate: Callable[..., None]) -> None:
    query, key, value = (torch.randn(1, 2, 1, 32) for _ in range(3))
    cos, sin, length = torch.randn(1, 1, 32), torch.randn(1, 1, 32), torch.tensor(40)
    cache = [torch.randn(1, 2, 40, 32) for _ in range(2)]
    before = [part.clone() for part in cache]
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    emulate(query, key, value, cos, sin, *cache, mask, length)
    attention_module.attention_step(query, key, value, cos, sin, *cache, length, mask, 0.2)
    assert all(torch.equal(*pair) for pair in zip(cache, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [96, 40_008])
def test_most_likely(emulate: Callable[..., None], vocabulary: int, dtype: torch.dtype) -> None:
    """Equals and NaN included: the first one, in whichever block it lies."""
    torch.manual_seed(0)
    logits = torch.randn(6, vocabulary).to(dtype)
    logits[1] = 0.0
    logits[2, vocabulary // 2], logits[2, 70] = 9.0, 9.0
    logits[3, -1] = torch.inf
    logits[4, 50], logits[4, 51], logits[4, vocabulary // 2] = torch.nan, torch.nan, torch.inf
    logits[5] = -torch.inf
    emulate(logits)
    assert torch.equal(likely_module.most_likely(logits), logits.argmax(-1))


def test_gate(emulate: Callable[..., None]) -> None:
    x, t = torch.randn(3, 104).bfloat16(), [torch.rand(104), torch.rand(104)]
    emulate(x, *t)
    for found, vector in zip(gate_module.gate(x, t), t, strict=True):
        assert torch.equal(found, reference.drop(x, vector))


def test_the_buckets_of_tokens(emulate: Callable[..., None]) -> None:
    torch.manual_seed(0)
    config = Config(lanes=4, groups=8, unroll=2, cluster=2, loads=2)
    for tokens in (TOKENS[-1] - 1, TOKENS[-1]):
        x, w, t = torch.randn(tokens, 72).bfloat16(), weight(72, 40, torch.bfloat16), torch.rand(72)
        emulate(x, w, t)
        (found,) = rows_module.rows(x, [w], [t], [None], config)
        assert_close(found, reference.sparse_linear(x, w, t), rtol=3.2e-2, atol=3.2e-2)


@pytest.mark.parametrize("tokens", [1, 3])
def test_flags_and_results_side_by_side(emulate: Callable[..., None], tokens: int) -> None:
    torch.manual_seed(tokens)
    dtype, inputs, outputs = torch.bfloat16, 200, (120, 40, 48)
    x = torch.randn(tokens, inputs).to(dtype)
    weights = [weight(inputs, n, dtype) for n in outputs]
    thresholds = [torch.rand(inputs) * (1 + i) for i in range(3)]
    biases = [torch.randn(outputs[0]).to(dtype), None, None]
    config = Config(lanes=4, groups=8, unroll=4, cluster=2, whole=int(tokens == 1))
    for flags in (torch.arange(tokens) % 2 == 0, torch.arange(tokens) % 2 == 1):
        out = torch.empty(tokens, sum(outputs), dtype=dtype)
        emulate(x, flags, out, *weights, *thresholds, *biases)
        rows_module.rows(x, weights, thresholds, biases, config, flags=flags, out=out)
        dropped = reference.sparse_linears(x, weights, thresholds, biases)
        zeros = [torch.zeros(inputs)] * 3
        whole = reference.sparse_linears(x, weights, zeros, biases)
        wanted = torch.where(flags[:, None], torch.cat(dropped, -1), torch.cat(whole, -1))
        assert_close(out, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
