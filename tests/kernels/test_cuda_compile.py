"""The CUDA kernels compile for Hopper and Blackwell, without a device: needs NVRTC alone."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")

from wina.errors import WinaError
from wina.kernels.cuda import rows, table
from wina.kernels.cuda.attention import UNROLL
from wina.kernels.cuda.compile import compiled, mapping
from wina.kernels.cuda.tune import cuts, streams
from wina.kernels.shapes import Shape

HOPPER, UNITS = (9, 0), 132
LLAMA = [
    Shape(4096, (14336,), gated=True, normed=True),
    Shape(14336, (4096,), added=True),
    Shape(4096, (4096, 1024, 1024), normed=True),
    Shape(4096, (128256,)),
    Shape(576, (576, 192, 192), normed=True),
]


@pytest.fixture(autouse=True)
def needs_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path))
    try:
        compiled("gate.cu", (("ELEMENT", 2),), HOPPER)
    except (RuntimeError, ImportError, OSError) as error:
        if isinstance(error, WinaError):
            raise
        pytest.skip(f"needs the NVRTC library (nvidia-cuda-nvrtc): {error}")


def spilled(binary: bytes, folder: Path) -> int | None:
    """Return the bytes of a thread's stack; None without Triton's disassembler."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    command = [tool, "--dump-resource-usage", path]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"STACK:(\d+)", found)
    assert match is not None, found
    return int(match[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("shape", LLAMA, ids=str)
def test_rows(shape: Shape, tokens: int, dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = (tokens, dtype.itemsize)
    config = table.rule(shape.inputs, shape.outputs, shape.gated, *sizes, UNITS)
    if config is None:
        pytest.skip("its lists fit no block's shared memory: a dense product serves")
    options = {"gated": shape.gated, "norm": shape.normed}
    macros = rows.macros_of(config, dtype, shape.inputs, tokens, **options)
    stack = spilled(compiled("rows.cu", mapping(macros), HOPPER), tmp_path)
    assert stack in (None, 0)


def test_a_later_architecture() -> None:
    config = rows.Config(16, 32)
    macros = rows.macros_of(config, torch.bfloat16, 4096, 1, gated=True, norm=True)
    assert compiled("rows.cu", mapping(macros), (10, 0))


@pytest.mark.parametrize("rotary", [0, 64, 128])
@pytest.mark.parametrize("queries", [1, 4, 7, 8])
def test_attention(queries: int, rotary: int, tmp_path: Path) -> None:
    macros = {"ELEMENT": 2, "SIZE": 128, "QUERIES": queries, "CLUSTER": 16, "UNROLL": UNROLL}
    macros["ROTARY"] = rotary
    assert spilled(compiled("attention.cu", mapping(macros), HOPPER), tmp_path) in (None, 0)


def test_what_is_compiled_is_kept(tmp_path: Path) -> None:
    macros = (("ELEMENT", 1),)
    binary = compiled("gate.cu", macros, HOPPER)
    files = list((tmp_path / "cuda").iterdir())
    assert compiled("gate.cu", macros, HOPPER) == binary
    assert list((tmp_path / "cuda").iterdir()) == files


def test_an_error_shows_the_compilers_words() -> None:
    with pytest.raises(WinaError, match="LANES"):
        compiled("rows.cu", (("ELEMENT", 2),), HOPPER)


@pytest.mark.parametrize("shape", LLAMA, ids=str)
def test_candidates_fit_a_multiprocessor(shape: Shape) -> None:
    for tokens in rows.TOKENS:
        for config in cuts(shape, tokens, 2, UNITS)[:4]:
            for one in (config, *streams(config, shape, tokens, 2)):
                size = rows.shared_bytes(one, shape.inputs, shape.gated, tokens, 2)
                assert size <= 220 << 10
                assert 32 <= one.threads <= 1024
