"""What a mixture's experts cost, dense and sparse: prompts by each implementation, and decoding.

    python benchmarks/experts.py --shape olmoe --layers 2 --threads 1

A few blocks of a known mixture's shape, random weights. Dense, 0 % and the given sparsities take
turns on the same weights; 0 % and prompts should cost what the dense model costs, before and after
the weights are laid out for decoding. Times are medians.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.initialization import no_init_weights

from wina import layers
from wina.generation import Decoder
from wina.models import find_sites
from wina.plan import ModelIdentity, Plan, PlanDocument, PlannedLinear

SHAPES: dict[str, Any] = {  # as published, but for the number of blocks and a short vocabulary
    "olmoe": lambda blocks: OlmoeConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        pad_token_id=0,
        eos_token_id=None,
    ),
    "qwen3-30b-a3b": lambda blocks: Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    ),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
COPIED = 64  # chosen experts whose weights batched_mm may copy at a time


@torch.no_grad()
def a_model(shape: str, blocks: int, dtype: torch.dtype) -> PreTrainedModel:
    """Return a random model in evaluation mode."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(SHAPES[shape](blocks), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0)
    return model.eval()


@torch.no_grad()
def a_plan(model: PreTrainedModel, sparsity: float) -> Plan:
    """Return a plan that drops about this share of each linear's inputs on a short text."""
    linears, vectors, sums = {}, {}, {}
    sites = find_sites(model)
    with layers.opened(model):
        handles = [
            model.get_submodule(site.name).register_forward_pre_hook(
                lambda _m, args, name=site.name: sums.update({name: args[0].float().abs()})
            )
            for site in sites
        ]
        model(torch.arange(64)[None], use_cache=False)
        for handle in handles:
            handle.remove()
    for site in sites:
        seen = sums.get(site.name)
        cut = 0.0 if seen is None or not sparsity else float(seen.flatten().quantile(sparsity))
        vectors[site.name] = torch.full((site.in_features,), cut)
        linears[site.name] = PlannedLinear(
            kind=site.kind,
            block=site.block,
            in_features=site.in_features,
            out_features=site.out_features,
            sparsity=sparsity,
        )
    document = PlanDocument(
        model=ModelIdentity(name="random", config_hash="", weights_hash="", dtype="bfloat16"),
        method="teal",
        allocation="uniform",
        selection="threshold",
        target_sparsity=sparsity,
        linears=linears,
    )
    return Plan(document, vectors)


def median(run: Callable[[], object], rounds: int) -> float:
    """Return the median time in milliseconds."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


@torch.no_grad()
def prompts(model: PreTrainedModel, tokens: int, rounds: int) -> dict[str, float]:
    """Return milliseconds of a prompt by each implementation of the experts."""
    whole = torch.randint(4096, (1, tokens), generator=torch.Generator().manual_seed(1))
    few = COPIED // model.config.num_experts_per_tok
    found = {}
    for name in IMPLEMENTATIONS:
        ids = whole[:, :few] if name == "batched_mm" else whole
        model.set_experts_implementation(name)
        model(ids, use_cache=False)
        what = f"{name}, {ids.shape[1]} positions"
        found[what] = round(median(lambda ids=ids: model(ids, use_cache=False), rounds), 1)
    return found


def decoding(model: PreTrainedModel, tokens: int, rounds: int) -> dict[str, float]:
    """Return milliseconds a decoded token by each implementation, in wina's eager loop."""
    found = {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        decoder = Decoder(model, 64 + tokens * (rounds + 1), mode="eager")
        decoder.prefill([list(range(64))])

        def some(decoder: Decoder = decoder) -> None:
            for _ in range(tokens):
                decoder.step()

        some()
        found[name] = round(median(some, rounds) / tokens, 2)
    return found


def main(
    shape: Annotated[str, typer.Option()] = "olmoe",
    blocks: int = 2,
    threads: int = 1,
    dtype: str = "bfloat16",
    sparsities: str = "0,0.5,0.65",
    prompt: int = 128,
    rounds: int = 5,
    tokens: int = 8,
) -> None:
    """Time prompts and decoding; print one JSON object."""
    torch.set_num_threads(threads)
    model = a_model(shape, blocks, getattr(torch, dtype))
    plans = {f"{float(x):.0%}": a_plan(model, float(x)) for x in sparsities.split(",")}
    results: dict[str, Any] = {}
    results["dense"] = {
        "prompt": prompts(model, prompt, rounds),
        "decode": decoding(model, tokens, rounds),
    }
    for name, plan in plans.items():
        layers.sparsify(model, plan)
        results[name] = {
            "prompt": prompts(model, prompt, rounds),
            "decode": decoding(model, tokens, rounds),
        }
        layers.lay_out_for_decode(model)
        results[f"{name}, laid out"] = {
            "prompt": prompts(model, prompt, rounds),
            "decode": decoding(model, tokens, rounds),
        }
        layers.densify(model)
    results["dense again"] = {
        "prompt": prompts(model, prompt, rounds),
        "decode": decoding(model, tokens, rounds),
    }
    about = {
        "shape": shape,
        "blocks": blocks,
        "dtype": dtype,
        "threads": threads,
        "prompt_positions": prompt,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "unit": "milliseconds, a prompt and a token",
    }
    print(json.dumps(about | {"results": results}, indent=1))


if __name__ == "__main__":
    typer.run(main)
