"""A model's identity: hashes that do not depend on where it was loaded from, or how.

config_hash is the SHA-256 of those config values that fix the function computed, in sorted JSON.
weights_hash is the SHA-256 over the sorted lines "name shape digest" of all parameters, each
digest the SHA-256 of the parameter's values rounded to bfloat16, values below 2**-14 as zero:
float32, bfloat16 and float16 copies of one bfloat16 or quantized checkpoint agree. (A checkpoint
stored in float32 and loaded in float16 is rounded twice and may differ.)
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from transformers import PreTrainedModel

from wina.plan import ModelIdentity

CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
)
SMALLEST_NORMAL_FLOAT16 = 2.0**-14


def identify(model: PreTrainedModel, name: str, revision: str | None = None) -> ModelIdentity:
    """Return the identity of ``model``, whose weights are all read (about 1 GB/s a core)."""
    config = model.config.get_text_config()
    facts = {key: getattr(config, key, None) for key in CONFIG_KEYS}
    return ModelIdentity(
        name=name,
        revision=revision,
        config_hash=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        weights_hash=_weights_hash(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _weights_hash(model: nn.Module) -> str:
    parameters = sorted(model.named_parameters())
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_digest, (parameter for _, parameter in parameters))
    total = hashlib.sha256()
    for (name, parameter), digest in zip(parameters, digests, strict=True):
        total.update(f"{name} {list(parameter.shape)} {digest}\n".encode())
    return total.hexdigest()


@torch.no_grad()
def _digest(parameter: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for chunk in torch.split(parameter.detach().flatten(), 1 << 24):
        rounded = chunk.to(torch.bfloat16)
        rounded = torch.where(rounded.abs() < SMALLEST_NORMAL_FLOAT16, 0, rounded)
        digest.update(rounded.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
