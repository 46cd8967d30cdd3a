"""benchmarks/quantized_table.py: its weights are torchao's, and its table is what it says."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import english
from wina.models.quantize import Scheme, _config

SCRIPT = Path(__file__).parents[2] / "benchmarks/quantized_table.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g64"])
def test_weights_are_those_of_torchao(script: dict[str, Any], name: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    linear = nn.Linear(192, 320, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight *= torch.rand(192) * 3
        linear.weight[3] = 0
        linear.weight[5].abs_()
    weight = linear.weight.detach().clone()
    torchao.quantize_(linear, _config(Scheme.parse(name)), filter_fn=lambda *_: True)
    packed: Any = linear.weight
    if name == "int8":
        codes, scales = script["int8_codes"](weight)
        assert torch.equal(scales, packed.scale)
    else:
        codes, scales, zeros = script["affine_codes"](weight, 4, int(name[6:]))
        assert torch.equal(scales, packed.scale)
        assert torch.equal(zeros, packed.zero_point)
    assert torch.equal(codes.reshape(weight.shape).to(torch.int8), packed.qdata)


def test_gptq_loses_less_than_rounding(script: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 64) @ torch.randn(64, 64)
    weight = torch.randn(48, 64)

    def lost(made: torch.Tensor) -> float:
        return float(((made - weight) @ x.T).square().sum())

    for bits in (2, 3):
        nearest = script["affine"](weight, bits, 16)
        made = script["gptq"](weight, x.T @ x, bits, 16)
        assert lost(made) < 0.6 * lost(nearest)
        for row in made.reshape(48, 4, 16)[:4]:
            assert all(len(set(group.tolist())) <= 1 << bits for group in row)


@pytest.mark.slow
def test_table(
    script: dict[str, Any], qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra report)")
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(english(20_000), encoding="utf-8")
    second.write_text(english(60_000)[-20_000:], encoding="utf-8")
    out = tmp_path / "out"
    arguments = {
        "text": second,
        "calibration_text": first,
        "model": str(qwen3),
        "formats": "bf16,int8,int4-g16",
        "dense_formats": "int3-g16,int3-g16-gptq",
        "sparsities": "0.3,0.6",
        "plans": None,
        "tune": "0.5",
        "tune_formats": "int8",
        "tune_steps": 2,
        "gguf": False,
        "tokens": 900,
        "calibration_tokens": 1024,
        "context": 128,
        "dense_prefix": 4,
        "device": "cpu",
    }
    script["main"](out, **arguments)
    said = capsys.readouterr().out
    rows = {x["name"]: x for x in map(json.loads, (p.read_text() for p in out.glob("rows/*.json")))}
    assert len(rows) == 3 * 3 + 1 + 2
    assert (out / "bytes.svg").read_text().count("<svg") == 1

    # Two blocks of q (32 x 32), k, v (16 x 32), o (32 x 32), gate, up (48 x 32), down (32 x 48).
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    outputs = 2 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
    head = 320 * 32
    assert rows["bf16-dense"]["bytes"] == 2 * (weights + head)
    assert rows["int8-dense"]["bytes"] == weights + 4 * outputs + head + 4 * 320
    groups = weights / 16
    assert rows["int4-g16-dense"]["block_bytes"] == weights / 2 + 3 * groups
    assert rows["int3-g16-dense"]["block_bytes"] == weights * 3 / 8 + (2 + 3 / 8) * groups
    sparse = rows["bf16-loss-0.6"]
    thresholds = 4 * 2 * (6 * 32 + 48)
    kept = 2 * weights * (1 - sparse["sparsity"])
    assert sparse["block_bytes"] == pytest.approx(kept + thresholds)
    # Of 16 channels hardly ever all are dropped: nearly all scales are read.
    quarter = rows["int4-g16-loss-0.6"]
    rest = quarter["block_bytes"] - thresholds
    padded = 2 * 64 * (6 * 32 + 48)  # a row of each input is one block of 64 bytes here
    assert 0.2 * padded + 2.7 * groups < rest < 0.6 * padded + 3 * groups
    assert rows["int8-tuned-0.5"]["sparsity"] == pytest.approx(0.5, abs=0.1)

    table = (out / "table.md").read_text()
    assert table in said
    assert "| int4-g16 | loss | 60% |" in table
    assert "At equal bytes" in table
    stamp = {path: path.stat().st_mtime_ns for path in out.glob("rows/*.json")}
    script["main"](out, **{**arguments, "text": None})  # the tables again, without a model
    assert (out / "table.md").read_text() == table
    script["main"](out, **arguments)  # nothing is left to be done
    assert stamp == {path: path.stat().st_mtime_ns for path in out.glob("rows/*.json")}
