import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ViTConfig

from tests import families
from tests.helpers import make_model, make_tokenizer
from wina.errors import UsageError, WinaError
from wina.models import identify, load_model, skeleton
from wina.models.loading import folder_of, load_config


def test_a_folder_is_loaded_as_it_is(qwen3: Path) -> None:
    loaded = load_model(str(qwen3))
    assert loaded.name == str(qwen3)
    assert loaded.revision is None
    assert not loaded.model.training
    assert identify(loaded.model, "x") == identify(make_model("qwen3"), "x")
    assert loaded.tokenizer.chat_template


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(qwen3: Path, dtype: str) -> None:
    assert load_model(str(qwen3), dtype=dtype).model.dtype == getattr(torch, dtype)


def test_auto_is_the_checkpoints_dtype(tmp_path: Path, qwen3: Path) -> None:
    loaded = load_model(str(qwen3), dtype="bfloat16")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).model.dtype == torch.bfloat16


def test_a_config_without_the_weights(qwen3: Path, tmp_path: Path) -> None:
    assert load_config(str(qwen3)).hidden_size == 32
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WinaError, match="cannot load the config"):
        load_config(str(tmp_path))


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a tiny Llama as a GGUF file in float32."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(core["vocab"], key=core["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem not in NAMES:
            _, _, block, rest = stem.split(".", 3)
            stem = f"blk.{block}.{NAMES[rest]}"
        else:
            stem = NAMES[stem]
        writer.add_tensor(f"{stem}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_tokenizer_beside_a_gguf_file_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path / "cache"))
    model = families.make(families.DENSE[0])
    path = tmp_path / "files" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, model, make_tokenizer())
    for _ in range(2):  # the second time from the cache
        plain = load_model(str(path))
        assert plain.tokenizer("so")["input_ids"] == make_tokenizer()("so")["input_ids"]
    wanted = plain.model(torch.tensor([[1, 2]])).logits
    make_tokenizer(bos=True).save_pretrained(path.parent)
    for _ in range(2):
        loaded = load_model(str(path))
        assert loaded.tokenizer("so")["input_ids"] == make_tokenizer(bos=True)("so")["input_ids"]
        assert torch.equal(loaded.model(torch.tensor([[1, 2]])).logits, wanted)
    (path.parent / "tokenizer.json").unlink()
    assert load_model(str(path)).tokenizer("so")["input_ids"] == plain.tokenizer("so")["input_ids"]


def test_where_other_programs_load_from(qwen3: Path, tmp_path: Path) -> None:
    assert folder_of(str(qwen3)) == str(qwen3)
    assert folder_of("some/model") == "some/model"
    with pytest.raises(WinaError, match="holds no model"):
        folder_of(str(tmp_path))


def test_a_skeleton_has_names_and_shapes_but_no_storage(model: PreTrainedModel) -> None:
    found = skeleton(model.config)
    assert {x: y.shape for x, y in found.state_dict().items()} == {
        x: y.shape for x, y in model.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in found.parameters())
    with pytest.raises(UsageError, match="no causal language model of type 'vit'"):
        skeleton(ViTConfig())
