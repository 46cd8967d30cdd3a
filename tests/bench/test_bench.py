import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from tests.helpers import Cli, make_plan, prompt
from wina.bench import (
    CONFIGS,
    BenchReport,
    BenchSettings,
    bench,
    llama_cpp,
    random_calibration,
    random_model,
)
from wina.bench import run as run_module
from wina.bench.run import _weight_bytes
from wina.errors import UsageError
from wina.generation import generate
from wina.layers import SparsityCounter, sparsify
from wina.plan import Plan

SMALL = BenchSettings(sparsities=(0.0, 0.5), context=20, rounds=2, tokens=3, compare_tokens=6)


@pytest.fixture
def tiny_config(monkeypatch: pytest.MonkeyPatch) -> str:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    monkeypatch.setitem(CONFIGS._entries, "tiny", config)
    return "tiny"


def test_a_benchmark_reports_what_it_measured(model: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = replace(SMALL, baselines=("hf-eager", "own-compiled", "llama.cpp-f16"))
    report = bench(
        model, lambda target: make_plan(model, target), settings, name="tiny", method="wina"
    )
    assert len(report.results) == 2
    hf, own, llama = report.baselines
    assert hf.tokens_per_second
    assert own.tokens_per_second
    assert llama.tokens_per_second is None
    assert "qwen3" in llama.note or "not installed" in llama.note
    best = max(hf.tokens_per_second, own.tokens_per_second)
    for result in report.results:
        assert result.speedup == pytest.approx(result.tokens_per_second / best)
        assert result.tokens_per_second == pytest.approx(1e3 / result.milliseconds)
        assert result.byte_efficiency == pytest.approx(result.speedup / result.byte_speedup)
        assert result.same_text, result.text_note
    dense, sparse = report.results
    assert dense.realized_sparsity == 0
    assert dense.byte_speedup == pytest.approx(1)
    assert 0.1 < sparse.realized_sparsity < 0.9
    assert sparse.byte_speedup > 1
    assert report.read_bandwidth_gbps > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_are_prepacked_only_where_onednn_has_the_dtype(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_module.multiplies(torch.float32)
    monkeypatch.setattr(run_module, "multiplies", lambda dtype: False)
    settings = replace(SMALL, baselines=("prepacked",), compare_tokens=0)
    report = bench(
        model, lambda target: make_plan(model, target), settings, name="tiny", method="wina"
    )
    assert report.baselines[0].note == "oneDNN has no float32 on this processor"


def test_touched_bytes_are_those_of_live_channels(model: PreTrainedModel) -> None:
    dense = _weight_bytes(model)
    embedding = model.get_input_embeddings().weight
    every = sum(x.numel() * x.element_size() for x in model.parameters())
    assert dense == every - embedding.nbytes + embedding[0].nbytes
    sparsify(model, make_plan(model, 1e9))  # drops all
    with SparsityCounter(model) as counter:
        generate(model, prompt(5)[0].tolist(), 3)
    linears = sum(x.weight.nbytes for n, x in model.named_modules() if n.endswith("_proj"))
    assert dense - _weight_bytes(model, counter) == pytest.approx(linears)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsities": ()}, "at least one sparsity"),
        ({"sparsities": (1.0,)}, "sparsity"),
        ({"baselines": ("fastest",)}, "unknown baseline 'fastest'"),
        ({"tokens": 0}, "tokens must be at least 1"),
    ],
)
def test_bad_settings(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        BenchSettings(**options)  # type: ignore[arg-type]


def test_the_command_prints_one_object(tiny_config: str, cli: Cli) -> None:
    done = cli(
        *("bench", "--config", tiny_config, "--device", "cpu", "--sparsities", "0.5"),
        *("--rounds", 1, "--tokens", 2, "--context", 16, "--baselines", "hf-eager"),
        *("--compare-tokens", 4, "--dtype", "float32", "--include-head", "--json"),
    )
    assert done.code == 0, done.err
    report = BenchReport.model_validate(json.loads(done.out))
    assert report.include_head
    assert report.dtype == "float32"
    assert report.results[0].realized_sparsity == pytest.approx(0.5, abs=0.1)
    assert {"device", "dtype", "threads", "model", "read_bandwidth_gbps"} <= json.loads(
        done.out
    ).keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config", "llama-3-7b"), "Did you mean 'llama-3-8b'"),
        (("demo", "--config", "llama-3-8b"), "not both"),
        (("--sparsities", "half"), "takes numbers separated by commas"),
        (("--threads", "-1"), "threads must not be negative"),
    ],
)
def test_bad_commands(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    done = cli("bench", *arguments)
    assert done.code == 2
    assert said in done.said


def test_random_models_have_the_shape_and_plans(tiny_config: str) -> None:
    model = random_model(tiny_config, torch.float32, torch.device("cpu"))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(
        96**-0.5, rel=0.05
    )
    plan = random_calibration(model, "tiny").plan(sparsity=0.5, allocation="uniform")
    assert plan.sparsity == pytest.approx(0.5, abs=0.02)


def test_llama_cpp_decodes_the_same_weights(tiny_config: str) -> None:
    pytest.importorskip("llama_cpp")
    model = random_model(tiny_config, torch.float32, torch.device("cpu"))
    assert llama_cpp.unavailable(model) is None
    ids = torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(1))
    with llama_cpp.decoding(model, ids, 32, "f16", 1) as (run, tokens):
        assert tokens == generate(model, ids[0].tolist(), len(tokens)).ids
        assert run(2) > 0


def test_a_gguf_file_holds_the_weights(tiny_config: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = random_model(tiny_config, torch.float32, torch.device("cpu"))
    llama_cpp.write_gguf(model, tmp_path / "m.gguf", "f16")
    found = {x.name: x for x in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(found) == 2 + 2 * 9
    down = torch.tensor(found["blk.1.ffn_down.weight"].data.copy()).float()
    torch.testing.assert_close(down, model.model.layers[1].mlp.down_proj.weight.half().float())


def plan_of(model: PreTrainedModel) -> Callable[[float], Plan]:
    """Return what makes plans with a threshold that is the target, whatever that drops."""

    def make(target: float) -> Plan:
        plan = make_plan(model, target)
        document = plan.document.model_copy(update={"target_sparsity": target})
        return replace(plan, document=document)

    return make


def test_plans_of_like_layers_share_one_compiled_step(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    real = run_module.decoder_at
    monkeypatch.setattr(run_module, "decoder_at", lambda *a: compiled.append(a) or real(*a))
    settings = replace(SMALL, sparsities=(0.2, 0.0, 0.6, 0.4), baselines=())
    report = bench(model, plan_of(model), settings, name="tiny", method="wina")
    assert len(compiled) == 2  # one for the plan that drops nothing
    assert [one.sparsity for one in report.results] == [0.2, 0.0, 0.6, 0.4]
    realized = [one.realized_sparsity for one in report.results]
    assert realized[1] == 0 < realized[0] < realized[3] < realized[2]
    assert all(one.same_text for one in report.results)
