"""Attention of one new position over a static cache, for Transformers' attention interface.

A static cache is longer than what it holds, and its keys and values are shared by several query
heads. Transformers' own path copies them for each query head when compiled; this one reads each
of them once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from wina import kernels
from wina.kernels import reference

NAME = "wina_decode"
# What other models' attention adds; they keep Transformers' own.
UNKNOWN = ("softcap", "s_aux", "position_bias", "output_attentions", "cache")


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the kernel for one position, and anything else as ``sdpa`` does."""
    simple = query.shape[2] == 1 and attention_mask is not None and dropout == 0.0
    if simple and attention_mask is not None:
        simple = attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
        simple = simple and attention_mask.shape[-1] == key.shape[2]
    if not simple or any(options.get(name) is not None for name in UNKNOWN):
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return found
    assert attention_mask is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = kernels.decode_attention
    if query.dtype == torch.float64:
        kernel = reference.decode_attention
    return kernel(query, key, value, attention_mask, scale).transpose(1, 2), None


def decode_mask(*args: Any, **options: Any) -> Tensor | None:
    """Return sdpa's mask, never leaving it out: a static cache holds positions not yet filled."""
    options["allow_is_causal_skip"] = False
    found: Tensor | None = sdpa_mask(*args, **options)
    # A tensor of its own: a view of it would be copied anew for each layer when compiled.
    return None if found is None else found.clone(memory_format=torch.contiguous_format)


@contextmanager
def decoding_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that attends by ``sdpa`` use ``decode_attention`` inside the block."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


AttentionInterface.register(NAME, decode_attention)
AttentionMaskInterface.register(NAME, decode_mask)
