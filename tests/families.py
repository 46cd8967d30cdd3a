"""The families of the conformance run: a new one joins by one line in ``DENSE``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from tests.helpers import CONTEXT, VOCABULARY
from wina.layers.linear import is_linear

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        name: for people, models of the family included.
        model_type: Transformers'.
        config: what differs from SHAPE.
        notable: what its structure has that Llama's has not.
        refused: a part of the reason, if wina cannot sparsify it.
        wrapper: a multimodal model; ``config`` is then all of its config.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    notable: str = ""
    refused: str | None = None
    wrapper: bool = False

    @property
    def auto(self) -> Any:
        """Transformers' class that makes and loads such models."""
        return AutoModelForImageTextToText if self.wrapper else AutoModelForCausalLM


HEADS = {"head_dim": 8}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LAYERED = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
}
DENSE = (
    Case("Llama 2", "llama", {"num_key_value_heads": 4}, "multi-head attention"),
    Case("Llama 3, SmolLM2", "llama", {"tie_word_embeddings": True}, "tied head"),
    Case("Mistral", "mistral", {"sliding_window": 16}, "sliding window"),
    Case("Qwen2, Qwen2.5", "qwen2", {}, "q, k, v biases"),
    Case("Qwen3", "qwen3", HEADS, "q and k norms"),
    Case("Phi-3, Phi-4", "phi3", {}, "fused qkv_proj and gate_up_proj"),
    Case("Phi-2", "phi", {}, "parallel blocks, LayerNorm, plain MLP, biases"),
    Case("Gemma", "gemma", HEADS, "1 + weight norms, scaled embeddings"),
    Case("Gemma 2", "gemma2", HEADS, "soft-caps, four norms a block"),
    Case("Gemma 3", "gemma3_text", HEADS, "four norms a block, local and global attention"),
    Case("SmolLM3", "smollm3", {}, "layers without rotary embedding"),
    Case("OLMo", "olmo", {}, "norms without weights"),
    Case("OLMo 2", "olmo2", {}, "norms after each part"),
    Case("OLMo 3", "olmo3", {}, "norms after each part, sliding window"),
    Case("Granite", "granite", {"residual_multiplier": 0.5}, "scaled residual and logits"),
    Case("GLM-4-0414", "glm4", HEADS, "fused gate_up_proj, four norms a block"),
    Case("GLM-4", "glm", HEADS, "fused gate_up_proj"),
    Case(
        "Cohere Command R", "cohere", {}, "parallel blocks, LayerNorm without bias, scaled logits"
    ),
    Case("Cohere Command R7B", "cohere2", {}, "parallel blocks, sliding window"),
    Case("StarCoder2", "starcoder2", {}, "plain MLP, LayerNorm, biases"),
    Case("StableLM", "stablelm", {}, "LayerNorm, partial rotary embedding"),
    Case("Falcon 7B", "falcon", {"multi_query": True}, "fused qkv, multi-query, parallel blocks"),
    Case(
        "Falcon 40B",
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        "fused grouped qkv, two norms, parallel blocks",
    ),
    Case("Falcon RW", "falcon", {"alibi": True, "multi_query": False}, "fused qkv, ALiBi"),
    Case("GPT-NeoX, Pythia", "gpt_neox", {}, "fused qkv, parallel blocks, LayerNorm"),
    Case("OPT", "opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}, "learned positions, ReLU"),
    Case("GPT-2", "gpt2", {}, "Conv1D, fused qkv, learned positions"),
    Case("GPT-J", "gptj", {"rotary_dim": 4}, "parallel blocks"),
    Case("MPT", "mpt", {"max_seq_len": CONTEXT}, "fused Wqkv, ALiBi, no biases"),
    Case("BLOOM", "bloom", {}, "fused qkv, ALiBi, norm after embedding"),
    Case("EXAONE 4", "exaone4", {}, "norms after each part"),
    Case("Ernie 4.5", "ernie4_5", HEADS),
    Case("Nemotron", "nemotron", {}, "squared ReLU, plain MLP, 1 + weight LayerNorm"),
    Case("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"]}, "convolution blocks"),
    Case("Ministral 3", "ministral3", {}, "scaled queries"),
    Case("Seed-OSS", "seed_oss", {}, "q, k, v biases"),
    Case("Apertus", "apertus", {}, "plain MLP with a learned activation, q and k norms"),
    Case("Qwen3.5", "qwen3_5_text", HEADS | DELTA, "blocks of linear attention"),
    Case(
        "Gemma 3n",
        "gemma3n_text",
        HEADS | LAYERED | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]},
        "several residual streams, an input for each layer, low-rank bypasses",
    ),
    Case(
        "Gemma 4",
        "gemma4_text",
        HEADS | LAYERED | {"per_layer_config": {}},
        "an input for each layer, local and global attention",
    ),
    Case("Mamba", "mamba", {}, "", "no key-value cache"),
)
ROUTED = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS = (
    Case("Mixtral", "mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}, "experts"),
    Case("Qwen3-MoE", "qwen3_moe", HEADS | ROUTED, "experts"),
    Case(
        "Qwen2-MoE",
        "qwen2_moe",
        ROUTED | {"shared_expert_intermediate_size": 24},
        "experts, a gated shared expert",
    ),
    Case("OLMoE", "olmoe", ROUTED, "experts"),
    Case(
        "DeepSeek-V3, Kimi-K2", "deepseek_v3", DEEPSEEK, "experts, shared experts, latent attention"
    ),
    Case(
        "DeepSeek-V3.2",
        "deepseek_v32",
        DEEPSEEK | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 16},
        "experts, shared experts, latent attention over chosen positions",
    ),
    Case(
        "GLM-4.5",
        "glm4_moe",
        HEADS | ROUTED | {"n_routed_experts": 6, "first_k_dense_replace": 1},
        "experts, shared experts, a dense first block",
    ),
    Case(
        "gpt-oss",
        "gpt_oss",
        HEADS | {"num_local_experts": 6, "num_experts_per_tok": 2},
        "experts with biases, stored input-major, gate and up interleaved, attention sinks",
    ),
    Case(
        "Qwen3-Next",
        "qwen3_next",
        HEADS | ROUTED | DELTA | {"shared_expert_intermediate_size": 24},
        "experts, a gated shared expert, blocks of linear attention",
    ),
    Case("Phi-3.5-MoE", "phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, "experts"),
    Case(
        "Granite 4",
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
        "experts, shared experts, blocks of a state-space model",
    ),
    Case(
        "Jamba",
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "experts, blocks of a state-space model",
    ),
)
IMAGE = 300  # id of the token that stands for a piece of an image
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TURNS = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
MULTIMODAL = (
    Case(
        "Gemma 3 with vision",
        "gemma3",
        {
            "text_config": SHAPE | HEADS,
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
        "language model in a multimodal wrapper",
        wrapper=True,
    ),
    Case(
        "LLaVA",
        "llava",
        {
            "text_config": SHAPE | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
        },
        "language model in a multimodal wrapper",
        wrapper=True,
    ),
    Case(
        "Qwen2-VL",
        "qwen2_vl",
        {
            "text_config": SHAPE | TURNS,
            "vision_config": {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
            "image_token_id": IMAGE,
            "vision_start_token_id": 301,
            "vision_end_token_id": 302,
            "video_token_id": 303,
        },
        "language model in a multimodal wrapper, three-part rotary embedding",
        wrapper=True,
    ),
)
CASES = DENSE + EXPERTS + MULTIMODAL


def make(case: Case) -> PreTrainedModel:
    """Return a tiny random model of the family, in evaluation mode, float32, on the CPU."""
    torch.manual_seed(0)
    shape = {} if case.wrapper else SHAPE
    config = AutoConfig.for_model(case.model_type, **{**shape, **case.config})
    model = case.auto.from_config(config, dtype=torch.float32)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            # Norms and biases that are all one or zero would hide a dropped term, and columns of
            # equal norm the difference between criteria.
            if is_linear(module) and module is not head and module.weight.shape[0] > 1:
                module.weight *= torch.rand(module.weight.shape[1]) + 0.5
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 1:
                parameter *= torch.rand_like(parameter) + 0.5
            elif "experts" in name:
                parameter.normal_(std=0.2)
    return model.eval()
