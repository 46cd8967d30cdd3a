"""Tiny random models, a tiny tokenizer, and text: what the tests need instead of downloads."""

from __future__ import annotations

import pydoc_data.topics
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from wina.cli import main
from wina.plan import ModelIdentity, Plan, PlanDocument, PlannedLinear

VOCABULARY = 320
CONTEXT = 256
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
KINDS = ("qwen3", "mistral", "llama", "gpt2")


def english(characters: int) -> str:
    """Return prose from Python's own documentation."""
    topics = pydoc_data.topics.topics
    text = "\n".join(re.sub(r"[^\x20-\x7e\n]", "", topics[name]) for name in sorted(topics))
    return text[:characters]


def make_tokenizer(bos: bool = False, template: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; ``bos`` puts <s> before every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([english(20_000)], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(kind: str) -> PreTrainedConfig:
    """Return the config of a tiny model; grouped-query attention where the family has it."""
    shape = {
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
    if kind == "qwen3":
        return Qwen3Config(**shape, head_dim=8, tie_word_embeddings=False)
    if kind == "mistral":
        return MistralConfig(**shape, sliding_window=None)
    if kind == "llama":
        return LlamaConfig(**shape, tie_word_embeddings=True, attention_bias=True)
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=None,
    )


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Return a tiny random model in evaluation mode, float32, on the CPU."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(kind), dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            # Norms and biases that are all one or zero would hide a dropped term, and columns of
            # equal norm the difference between criteria.
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                module.weight *= torch.rand(module.weight.shape[1]) + 0.5
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(std=0.1)
    return model.eval()


@dataclass(frozen=True)
class Result:
    """What a command ended with; ``said`` is its standard error without boxes and line breaks."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return " ".join(self.err.replace("│", " ").split())


Cli = Callable[..., Result]


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run the command line in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main([str(argument) for argument in arguments])
    code = ending.value.code
    captured = capsys.readouterr()
    return Result(code if isinstance(code, int) else int(code is not None), *captured)


def make_plan(
    model: nn.Module,
    thresholds: Callable[[str, int], torch.Tensor] | float,
    *,
    keep: float | None = None,
    bias: bool = False,
    prefill: str = "dense",
    dense_prefix: int = 0,
    identity: ModelIdentity | None = None,
) -> Plan:
    """Return a plan for all linears of a tiny model without calibrating it.

    With ``keep``, a share of channels, it is a top-k plan and ``thresholds`` gives the scales;
    ``bias`` gives every linear one, as tuning does.
    """
    from wina.models import find_sites

    linears, vectors, biases = {}, {}, {}
    for site in find_sites(model):
        if callable(thresholds):
            vectors[site.name] = thresholds(site.name, site.in_features)
        else:
            vectors[site.name] = torch.full((site.in_features,), thresholds)
        linears[site.name] = PlannedLinear(
            kind=site.kind,
            block=site.block,
            in_features=site.in_features,
            out_features=site.out_features,
            sparsity=0.5,
            keep=None if keep is None else round(keep * site.in_features),
            bias=bias,
        )
        if bias:
            biases[site.name] = torch.linspace(-0.5, 0.5, site.out_features)
    document = PlanDocument(
        model=identity or ModelIdentity(name="tiny", config_hash="", weights_hash="", dtype=""),
        method="wina",
        allocation="uniform",
        selection="threshold" if keep is None else "topk",
        target_sparsity=0.5,
        linears=linears,
        prefill=prefill,  # type: ignore[arg-type]
        dense_prefix=dense_prefix,
    )
    return Plan(document, vectors, biases)


def prompt(length: int = 12, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Return random token ids, shape (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def write_model(folder: Path, kind: str, *, bos: bool = False, template: bool = False) -> Path:
    """Save a tiny model and its tokenizer."""
    make_model(kind).save_pretrained(folder)
    make_tokenizer(bos, template).save_pretrained(folder)
    return folder
