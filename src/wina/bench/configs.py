"""Shapes of known models, with random weights: speed does not depend on what weights say."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.initialization import no_init_weights

from wina.calibration import Calibration, CalibrationSettings, calibrate
from wina.registry import Registry


def _llama(hidden: int, wide: int, layers: int, size: int, tied: bool) -> Any:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=size,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        tie_word_embeddings=tied,
    )


# name -> config; the sizes are those that the models' authors published.
CONFIGS: Registry[Any] = Registry("config", "configs")
CONFIGS.add("llama-3.2-1b", _llama(2048, 8192, 16, 64, tied=True))
CONFIGS.add("llama-3-8b", _llama(4096, 14_336, 32, 128, tied=False))
CONFIGS.add(
    "smollm2-135m",
    LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
    ),
)
CONFIGS.add(
    "qwen2.5-7b",
    Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
    ),
)
CONFIGS.add(
    "mistral-7b",
    MistralConfig(
        vocab_size=32_768,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32_768,
        sliding_window=None,
    ),
)
CONFIGS.add(
    "phi-4",
    Phi3Config(
        vocab_size=100_352,
        hidden_size=5120,
        intermediate_size=17_920,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=10,
        max_position_embeddings=16_384,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    ),
)


@torch.no_grad()
def random_model(
    name: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PreTrainedModel:
    """Return a model of a named shape, its weights normal with variance 1 / in_features.

    Raises:
        UsageError: no config has that name.
    """
    config = CONFIGS.get(name)
    # The meta device has shapes only, and no generator.
    place = "cpu" if device.type == "meta" else device
    generator = torch.Generator(place).manual_seed(seed)
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # In place and in the final dtype: no second copy of a large model.
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
    return model.eval()


@dataclass(frozen=True)
class RandomText:
    """Random token ids: the text for a model whose weights are random."""

    vocabulary: int
    seed: int = 0
    resumable = True

    def describe(self) -> str:
        """Return the seed."""
        return f"random tokens, seed {self.seed}"

    def pieces(
        self, model: PreTrainedModel, tokenizer: Tokenizer, start: list[int], first: int
    ) -> Iterator[Sequence[int]]:
        """Yield 1,024 ids at a time, without end."""
        del model, tokenizer, start
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first)
            yield torch.randint(self.vocabulary, (1024,), generator=generator).tolist()
            first += 1


class IdsOnly:
    """As much of a tokenizer as calibration asks of one whose text is random ids."""

    bos_token_id = None
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Return no ids: whatever starts a text is not added."""
        del text, add_special_tokens
        return {"input_ids": []}


def random_calibration(model: PreTrainedModel, name: str, seed: int = 0) -> Calibration:
    """Calibrate a random model on a few random tokens, for its thresholds."""
    settings = CalibrationSettings(
        tokens=512, context=256, dense_prefix=4, seed=seed, gradient=False, verdict=False
    )
    vocabulary = model.config.get_text_config().vocab_size
    source = RandomText(vocabulary, seed)
    return calibrate(model, IdsOnly(), source, settings, name=name)
