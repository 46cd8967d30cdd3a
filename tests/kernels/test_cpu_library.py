"""Building, loading and tuning the compiled library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wina.errors import UsageError
from wina.kernels import available_backends, cpu
from wina.kernels.cpu import crossover

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the compiled kernels were not built"
)


def test_without_the_library_the_reference_serves_and_says_so_once(tmp_path: Path) -> None:
    code = (
        "import torch, wina.kernels as k\n"
        "assert k.available_backends() == ('reference',)\n"
        "x = torch.randn(2, 8); w = torch.randn(4, 8)\n"
        "for _ in range(2):\n"
        "    assert torch.equal(k.sparse_linear(x, w, torch.zeros(8)), x @ w.t())\n"
        "try:\n"
        "    with k.use_backend('cpu'): pass\n"
        "except ValueError as error: print(error)\n"
    )
    environment = dict(os.environ, WINA_CPU_LIBRARY=str(tmp_path / "missing.so"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("using the slow reference") == 1
    assert "missing.so was not built" in done.stdout


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_building_without_a_compiler_succeeds(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src/wina/kernels", tmp_path / "src/wina/kernels")
    for built in (tmp_path / "src/wina/kernels/cpu").glob("libwina_cpu.*"):
        built.unlink()
    done = subprocess.run(
        [sys.executable, "setup.py", "build"],
        cwd=tmp_path,
        env=dict(os.environ, CC="no-such-compiler", CXX="no-such-compiler"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "build").rglob("library.py"))
    assert not list((tmp_path / "build").rglob("libwina_cpu.*"))


@compiled
def test_crossover_is_measured_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path))
    monkeypatch.setattr(crossover, "ROWS", (1, 2))
    found = cpu.measure_crossover([(64, 96), (64, 96)], torch.float32, repeats=3)
    assert set(found) == {(64, 96)}
    assert found[64, 96] in (1, 2)
    (path,) = tmp_path.rglob("*.json")
    assert '"64x96"' in path.read_text()
    path.write_text("{", encoding="utf-8")
    crossover.load_crossover()  # a damaged file is no error
    measured: list[object] = []
    monkeypatch.setattr(crossover, "_measure", lambda *args: measured.append(args) or 2)
    for _ in range(2):
        crossover.ensure_crossover([(64, 96), (32, 40)], torch.float32)
    assert len(measured) == 2
    other = tmp_path / "another build of the library"
    other.write_bytes(b"")
    monkeypatch.setattr(crossover, "PATH", other)
    crossover.ensure_crossover([(32, 40)], torch.float32)
    assert len(measured) == 3
    with pytest.raises(UsageError, match="float64"):
        cpu.set_crossover(torch.float64, 1, 1, 1)


@compiled
def test_above_the_crossover_the_dense_path_agrees() -> None:
    from wina.kernels import reference, sparse_gated_mlp, sparse_linears

    x = torch.randn(5, 72)
    weight = cpu.input_major(torch.randn(72, 72))
    thresholds = torch.rand(72)
    try:
        cpu.set_crossover(torch.float32, 72, 72, 4)
        dense = sparse_gated_mlp(x, *[weight] * 3, *[thresholds] * 3)
        pair = sparse_linears(x, [weight] * 2, [thresholds] * 2)
    finally:
        cpu.set_crossover(torch.float32, 72, 72, 32)
    expected = reference.sparse_gated_mlp(x, *[weight] * 3, *[thresholds] * 3)
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(pair[1], reference.sparse_linear(x, weight, thresholds))


@compiled
def test_pieces_of_an_arena_are_separate_tensors() -> None:
    arena = cpu.Arena(chunk=4096)
    shapes = ((3, 5), (0, 4), (64, 64), (7, 1))
    pieces = [arena.empty(shape, torch.bfloat16) for shape in shapes]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    for number, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
        assert piece.shape == shape
        assert (piece == number).all()
        if piece.numel():
            assert piece.data_ptr() % 64 == 0
            assert piece.untyped_storage().nbytes() == piece.numel() * 2
    weight = torch.randn(6, 5)
    copy = cpu.input_major(weight, arena)
    assert torch.equal(copy, weight)
    assert copy.stride() == (1, 6)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [9, 13, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(33, 1), (31, 7), (100, 300), (2085, 61)])
def test_the_blocked_product_agrees(
    outputs: int, inputs: int, rows: int, dtype: torch.dtype
) -> None:
    from wina.kernels import dense_linear

    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(2, rows, inputs, generator=generator).to(dtype)[:, : rows // 2 + 1]
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    try:
        cpu.set_crossover(dtype, inputs, outputs, 0)
        for bias in (None, torch.randn(outputs, generator=generator).to(dtype)):
            found = dense_linear(x, cpu.input_major(weight), bias)
            wanted = torch.nn.functional.linear(
                x.double(), weight.double(), None if bias is None else bias.double()
            )
            near = 0.01 * inputs**0.5
            torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=near)
    finally:
        cpu.set_crossover(dtype, inputs, outputs, 8)


@compiled
def test_instruction_sets() -> None:
    assert cpu.instruction_set() in ("portable", "avx2", "avx512", "avx512_bf16")
    with cpu.use_instruction_set("portable"):
        assert cpu.instruction_set() == "portable"
    with pytest.raises(UsageError, match="mmx"), cpu.use_instruction_set("mmx"):
        pass
