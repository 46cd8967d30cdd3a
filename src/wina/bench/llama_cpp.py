"""llama.cpp as a dense baseline on the CPU, with the same weights, through llama-cpp-python.

The model is written as a GGUF file without a vocabulary: decoding by ids needs none. Only
llama-like models (Llama, Mistral, Qwen2) without sliding windows are written; others are left out.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina.bench.contenders import Contender
from wina.layers.foreign import dequantized
from wina.layers.linear import read_by_others

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
FORMATS = ("f16", "bf16", "q8_0", "q4_0")
PARTS = {
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


def unavailable(model: PreTrainedModel) -> str | None:
    """Return None, or why llama.cpp cannot be a baseline for this model here."""
    for package in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            return "not installed: pip install 'wina[bench]'"
    if model.device.type != "cpu":
        return "on the CPU only"
    if model.config.model_type not in ARCHITECTURES:
        return f"no GGUF is written for {model.config.model_type!r}"
    return None


def write_gguf(model: PreTrainedModel, path: Path, form: str) -> None:
    """Write a dense model's weights as f16, bf16, q8_0 or q4_0; vectors stay float32.

    With q4_0 the embeddings and the head are q8_0, as a model that wina quantizes to int4 has an
    int8 head.

    Args:
        model: a llama-like model, dense.
        path: of the file.
        form: one of ``FORMATS``.
    """
    import gguf

    config = model.config
    kind = ARCHITECTURES[config.model_type]
    writer: Any = gguf.GGUFWriter(path, kind)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: Tensor) -> None:
        array = tensor.detach().float().contiguous().numpy()
        if tensor.ndim == 1:
            writer.add_tensor(name, array)
            return
        edge = name in ("token_embd.weight", "output.weight")
        number = getattr(
            gguf.GGMLQuantizationType, "Q8_0" if edge and form == "q4_0" else form.upper()
        )
        writer.add_tensor(name, gguf.quants.quantize(array, number), raw_dtype=number)

    state = _floats(model)
    prefix = "model."
    add("token_embd.weight", state[f"{prefix}embed_tokens.weight"])
    add("output_norm.weight", state[f"{prefix}norm.weight"])
    if not config.tie_word_embeddings:
        add("output.weight", state["lm_head.weight"])
    for block in range(config.num_hidden_layers):
        for ours, theirs in PARTS.items():
            for what in ("weight", "bias"):
                tensor = state.get(f"{prefix}layers.{block}.{ours}.{what}")
                if tensor is None:
                    continue
                if kind == "llama" and theirs in ("attn_q", "attn_k"):
                    tensor = _interleaved(tensor, heads if theirs == "attn_q" else shared)
                add(f"blk.{block}.{theirs}.{what}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _floats(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's state with the weights of quantized linears as floats."""
    names = read_by_others(model)
    found = {f"{name}.weight": dequantized(model.get_submodule(name)) for name in names}
    return {**model.state_dict(), **found}


def _rope_base(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    base: Any = parameters.get("rope_theta") or getattr(config, "rope_theta", 10_000.0)
    return float(base)


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorder a head's rows from halves to pairs: llama.cpp rotates neighbours for this kind."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)


@contextmanager
def decoding(
    model: PreTrainedModel, prompt: Tensor, room: int, form: str, threads: int
) -> Iterator[tuple[Contender, list[int]]]:
    """Yield a contender and the greedy tokens it began with, its file deleted at the end.

    Args:
        model: dense.
        prompt: ids, shape (1, positions).
        room: positions that must fit.
        form: of the weights, one of ``FORMATS``.
        threads: how many.
    """
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path, form)
        llama: Any = Llama(
            str(path),
            n_ctx=room,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
            logits_all=False,
        )
        # The file's pages are read before they are timed.
        llama.eval(prompt[0].tolist())
        first = [_most_likely(llama)]
        for _ in range(3):
            llama.eval([first[-1]])
            first.append(_most_likely(llama))

        def run(tokens: int) -> float:
            llama.n_tokens = prompt.shape[1]  # forget what was decoded; eval drops it
            begin = time.perf_counter()
            for _ in range(tokens):
                llama.eval([first[0]])
            return (time.perf_counter() - begin) / tokens

        try:
            yield run, first
        finally:
            llama.close()


def _most_likely(llama: Any) -> int:
    import numpy as np

    size = llama.n_vocab()
    logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(size,))
    return int(torch.from_numpy(logits.copy()).argmax())
