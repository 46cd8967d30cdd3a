"""The papers' own numbers, from configs alone."""

import json
from pathlib import Path

import pytest
from transformers import (
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from tests.helpers import Cli, make_config
from wina.cost import token_cost
from wina.errors import UsageError

LLAMA3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
LLAMA2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)
QWEN25_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
PHI4 = Phi3Config(
    vocab_size=100352,
    hidden_size=5120,
    intermediate_size=17920,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=10,
    pad_token_id=None,
)
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65)


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (LLAMA3_8B, (7.50, 5.76, 4.71, 4.01, 2.97)),
        (QWEN25_7B, (7.07, 5.44, 4.46, 3.81, 2.83)),
        (LLAMA2_7B, (6.61, 4.99, 4.02, 3.37, 2.40)),
        (PHI4, (14.15, 10.74, 8.69, 7.33, 5.28)),
    ],
    ids=["llama3-8b", "qwen2.5-7b", "llama2-7b", "phi-4"],
)
def test_table_5_of_the_paper(config: PreTrainedConfig, billions: tuple[float, ...]) -> None:
    for sparsity, wanted in zip(SPARSITIES, billions, strict=True):
        found = token_cost(config, sparsity, basis="svd").paper.multiply_adds / 1e9
        assert found == pytest.approx(wanted, abs=0.02), sparsity


def test_the_rotations_are_paid_for() -> None:
    found = token_cost(LLAMA3_8B, 0.5, basis="svd")
    assert found.saved(found.paper) == pytest.approx(0.465, abs=0.0005)
    assert found.saved(found.true) == pytest.approx(0.322, abs=0.0005)
    assert found.rotation.multiply_adds == 2 * 32 * 4096**2
    # k_proj keeps 2,048 channels and has rank 1,024.
    assert found.free.multiply_adds == 32 * 1024 * 1024
    pca = token_cost(LLAMA3_8B, 0.5, basis="pca")
    assert (pca.rotation, pca.free.bytes) == (found.rotation, 0)
    plain = token_cost(LLAMA3_8B, 0.5)
    assert plain.rotation.bytes == plain.free.bytes == 0
    assert plain.saved(plain.true) == pytest.approx(0.465, abs=0.0005)


def test_bytes_by_hand() -> None:
    config = make_config("llama")
    hidden, inner, layers, vocabulary = 32, 48, 2, config.vocab_size
    attention = 2 * hidden * hidden + 2 * hidden * 16
    found = token_cost(config, 0.25, bytes_per_weight=4)
    assert found.blocks.bytes == 4 * layers * (attention + 3 * hidden * inner)
    assert found.head.bytes == 4 * vocabulary * hidden
    assert found.gating.bytes == 4 * layers * (6 * hidden + inner)
    assert found.true.bytes == 0.75 * found.blocks.bytes + found.head.bytes + found.gating.bytes
    dense = token_cost(config, 0.0)
    assert dense.true == dense.paper == dense.dense


def test_a_token_pays_for_the_experts_it_is_sent_to() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    found = token_cost(config, 0.5)
    attention, expert, router = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48, 32 * 4
    assert found.blocks.multiply_adds - attention - 2 * expert in (0, router)


def test_other_layouts_count_too() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
    assert token_cost(config, 0.0).blocks.multiply_adds == 2 * 12 * 32 * 32
    with pytest.raises(UsageError, match="sparsity must lie"):
        token_cost(config, 1.0)


def test_command(cli: Cli, tmp_path: Path) -> None:
    make_config("llama").save_pretrained(tmp_path)
    options = ("--sparsity", "0.5", "--preset", "wina-paper", "--json")
    by_folder, by_file = (
        json.loads(cli("cost", path, *options).out) for path in (tmp_path, tmp_path / "config.json")
    )
    assert by_folder == by_file
    assert by_folder["true"]["saved"] < by_folder["paper"]["saved"]
    shown = cli("cost", tmp_path, "--preset", "wina-paper")
    assert shown.code == 0
    assert "rotations" in shown.out
    assert cli("cost", tmp_path, "--preset", "wina-papr").code == 2
    assert cli("cost", tmp_path / "none.json").code == 1
