"""benchmarks/gpu_gemv.py and the tuning of the GPU kernels, with a device that does nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from tests.helpers import Cli
from wina.bench import CONFIGS
from wina.kernels.cuda import rows, table, tune
from wina.kernels.measured import Measured, fields_of
from wina.kernels.replay import Timing
from wina.kernels.shapes import Shape, sizes_of, step_shapes
from wina.kernels.triton import product

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_gemv.py"


class Replay:
    """Runs once; its time falls with the rows that a launch skips, and with the lanes."""

    def __init__(self, run: Callable[[int], object], copies: int) -> None:
        self.result = run(copies - 1)

    def time(self, replays: int = 3) -> Timing:
        return Timing(4.0, 5.0, 6.0)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_gemv", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_gemv", module)
    spec.loader.exec_module(module)
    properties = SimpleNamespace(
        L2_cache_size=1 << 12, multi_processor_count=4, major=9, minor=0, name="none"
    )
    for owner in (module, tune):
        monkeypatch.setattr(owner, "DEVICE", torch.device("cpu"))
        monkeypatch.setattr(owner, "Replay", Replay)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    monkeypatch.setattr(module, "available_backends", lambda: ("cuda",))
    monkeypatch.setattr(module, "read_bandwidth", lambda: 1e12)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(module.MODELS, "tiny", (64, 96, 64, 32))
    monkeypatch.setenv("WINA_CACHE", str(tmp_path))
    return module


class Silent:
    """A kernel that is launched and does nothing."""

    launched: ClassVar[list[tuple[int, int]]] = []

    def launch(self, blocks: int, shared: int, arguments: Any) -> None:
        self.launched.append((blocks, shared))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Return the macros of what would have been compiled."""
    programs: list[dict[str, int]] = []

    def compiled(source: str, macros: tuple[tuple[str, int], ...], capability: Any) -> bytes:
        programs.append(dict(macros))
        return b""

    monkeypatch.setattr(tune, "compiled", compiled)
    monkeypatch.setattr(rows, "kernel", lambda *a: Silent())
    return programs


def test_figures_of_every_operation(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--models", "tiny", "--dtypes", "float32", "--tokens", "1,3"]
    script.main([*arguments, "--sparsities", "0,0.5", "--quick", "--json", str(path)])
    report = json.loads(path.read_text())
    assert report["read_bandwidth_gbps"] == 1000
    names = {op.name for op in script.operations("tiny")}
    assert {row["op"] for row in report["rows"]} == names
    for row in report["rows"]:
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["of_dense"] == 1
    for name in names:
        kernels = [row["kernel"] for row in report["rows"] if row["op"] == name]
        assert kernels.count("wina auto") == 4
        assert kernels.count("compiled") == (2 if "norm" in name or "add" in name else 0)
    half = next(r for r in report["rows"] if r["op"] == "up" and r["sparsity"] == 0.5)
    assert half["touched_gbps"] == pytest.approx(64 * 96 * 4 * 0.5 / 5e3, abs=0.06)


def test_operations_compute_what_the_dense_step_does(script: ModuleType) -> None:
    for op in script.operations("tiny"):
        bench = script.Bench(op, 2, torch.float32, 0.5)
        bench.drop(0.0)
        found, wanted = bench.sparse().result, bench.dense(usual=True).result
        found = [found] if isinstance(found, torch.Tensor) else found
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        if op.kind == "mlp":  # the hidden features lose the share that was asked for
            bench.drop(0.5)
            assert float(bench.thresholds[2][0]) > 0


def test_tuning_writes_its_table(
    script: ModuleType, silent: list[dict[str, int]], tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    arguments = ["--models", "tiny", "--ops", "none", "--tuned-tokens", "1,4", "--shapes", "2"]
    try:
        script.main([*arguments, "--tune", str(path)])
        found = json.loads(path.read_text())
        (kind,) = found["table"]
        assert kind == "sm_90/4"
        assert set(found["table"][kind]) == {
            "gated 64->96 x1 16bit",
            "gated 64->96 x4 16bit",
            "96->64 x1 16bit",
            "96->64 x4 16bit",
        }
        # The dense product takes as long as all else here: nothing is worth skipping.
        assert set(found["table"][kind].values()) == {None}
        assert found["tried"]
        assert {one["shape"] for one in found["tried"]} == set(found["table"][kind])
        assert silent
        assert Silent.launched
        assert table.config_for(torch.empty(1, 96).bfloat16(), (64,), gated=False) is None
    finally:
        table.TABLE.forget()


@pytest.mark.usefixtures("script")
def test_autotune(
    silent: list[dict[str, int]], cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("wina.cli.autotune.unavailable", lambda name: None)
    arguments = ("autotune", "--config", "smollm2-135m", "--tokens", "1,2", "--json")
    shapes = ["gated 576->1536", "1536->576", "576->576+192+192", "576->576"]
    keys = {f"{shape} x{tokens} 16bit" for shape in shapes for tokens in (1, 2)}
    kept = rows.Config(8, 16, cluster=2)
    try:
        table.TABLE.remember("sm_90/4", {"1536->576 x1 16bit": kept})
        done = cli(*arguments)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["device"] == "sm_90/4"
        assert set(found["configurations"]) == keys
        # What is known is not measured again; all else takes as long as the dense product.
        known = found["configurations"].pop("1536->576 x1 16bit")
        assert rows.Config(**known) == kept
        assert set(found["configurations"].values()) == {None}
        assert set(table.TABLE.of("sm_90/4")) == keys
        tried = len(silent)
        assert tried > 0
        assert cli(*arguments).code == 0
        assert len(silent) == tried
        assert cli(*arguments, "--again").code == 0
        assert len(silent) > tried
    finally:
        table.TABLE.forget()
    config = CONFIGS.get("llama-3-8b")
    assert [shape.outputs for shape in step_shapes(*sizes_of(config))] == [
        (14336,),
        (4096,),
        (4096, 1024, 1024),
        (4096,),
    ]


def test_autotune_of_the_masked_product(
    script: ModuleType, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts run in the interpreter; none is faster than the masked copies here."""
    from wina.kernels.triton import tune as products

    sizes = (64, 96, 64, 32)
    monkeypatch.setattr(products, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(products, "Replay", Replay)
    monkeypatch.setattr(products, "ProcessPoolExecutor", lambda *a, **b: ThreadPoolExecutor(1))
    monkeypatch.setattr("wina.cli.autotune.unavailable", lambda name: None)
    monkeypatch.setattr("wina.cli.autotune.sizes_of", lambda config: sizes)
    shapes = ["64->96+96", "96->64", "64->64+32+32", "64->64"]
    arguments = ("autotune", "--config", "smollm2-135m", "--dtype", "float16", "--json")
    try:
        done = cli(*arguments, "--tokens", "16")
        assert done.code == 0, done.err
        found = json.loads(done.out)["configurations"]
        assert found == {f"16 {shape}": None for shape in shapes}
        assert set(product.TABLE.of("sm_90/4")) == set(found)
        cuts = products.cuts(16, Shape(4096, (4096,)), 132)
        assert len(cuts) == len(set(cuts)) > 10
        done = cli(*arguments[:-2], "float32", "--tokens", "16")
        assert done.code == 2
        assert "float16" in done.err
    finally:
        product.TABLE.forget()


def test_autotune_says_what_is_wrong(cli: Cli) -> None:
    done = cli("autotune", "--config", "llama-3-9b")
    assert done.code == 2
    assert "llama-3-8b" in done.err
    done = cli("autotune", "--config", "llama-3-8b", "--tokens", "3")
    assert done.code == 2
    assert "--tokens" in done.err
    if not torch.cuda.is_available():
        done = cli("autotune", "--config", "llama-3-8b")
        assert done.code == 1
        assert "CUDA" in done.err


def test_wrong_arguments(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--models", "other"], ["--sparsities", "1.5"]):
        with pytest.raises(SystemExit):
            script.parse(arguments)
    assert "known: llama-3-8b" in capsys.readouterr().err


def test_a_cache_that_is_damaged_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path))
    config = rows.Config(8, 16, cluster=2)
    path = table.TABLE.remember("sm_90/4", {"64->96 x1 16bit": config, "64->32 x1 16bit": None})
    table.TABLE.remember("sm_90/4", {"8->8 x1 16bit": config})
    assert len(json.loads(path.read_text())["sm_90/4"]) == 3
    path.write_text('{"sm_90/4": {"a": {"lanes": 1}}}')
    assert table.TABLE.read(path) == {}
    table.TABLE.forget()


@pytest.mark.parametrize("known", [table.TABLE, product.TABLE])
def test_the_shipped_tables_are_whole(known: Measured[Any]) -> None:
    content = json.loads(known.shipped.read_text())
    found = known.read(known.shipped)
    assert content == {
        kind: {key: fields_of(one) for key, one in entries.items()}
        for kind, entries in found.items()
    }
    assert content
