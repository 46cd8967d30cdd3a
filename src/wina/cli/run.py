"""`wina run`."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import TextStreamer

from wina.api import densify, sparsify
from wina.cli import options
from wina.errors import UsageError
from wina.generation import Decoder, Generation, Sampling, encode_prompt, generate
from wina.layers import lay_out_for_decode
from wina.measures import score_plan
from wina.models import LoadedModel, context_limit, identify, start_ids
from wina.plan import Plan
from wina.progress import console
from wina.tuning import TUNED

PROMPT = "Explain in a few sentences why the sky is blue."
SCORED_TOKENS = 2_048
SCORED_CONTEXT = 1_024
DENSE_PREFIX = 20
WARM_UP = 5

MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Draw from this share of the probability.")]


def run(
    model: options.Model = None,
    prompt: Annotated[str, typer.Option(help="What the model is asked.")] = PROMPT,
    sparsity: options.Sparsity = 0.5,
    method: options.Method = None,
    allocation: options.Allocation = None,
    selection: options.Selection = "threshold",
    include_head: options.IncludeHead = False,
    plan: options.PlanSource = None,
    calibration: options.CalibrationFolder = None,
    retune: options.Retune = False,
    max_increase: options.MaxIncrease = None,
    max_kl: options.MaxKl = None,
    limit_text: options.LimitText = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the chat template out.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Show dense beside sparse.")] = False,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Score both on text that nobody calibrated on.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compile_step: options.Compile = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Generate text with a sparse model, streaming.

    Without --plan or --calibration the model is calibrated once, on text that it writes itself and
    on docstrings; calibration and plan are kept for the next time.

    Examples:
        wina run --prompt "Why is the sky blue?"

        wina run HuggingFaceTB/SmolLM2-360M-Instruct --sparsity 0.4 --compare

        wina run demo --plan plan --temperature 0.7 --json

        wina run demo --max-perplexity-increase 5% --compare
    """
    allowed = options.limits(max_increase, max_kl, limit_text)
    if allowed is not None and (plan is not None or retune or method == TUNED):
        raise UsageError("a limit finds a plan of a criterion: leave --plan and --retune out")
    if retune and (plan is not None or calibration is not None or method not in (None, TUNED)):
        raise UsageError("--retune makes a tuned plan: leave --plan, --calibration, --method out")
    if retune:
        method = TUNED
    options.check_request(sparsity, method, allocation, selection)
    sampling = Sampling(temperature, top_p, seed)
    if max_new_tokens < 1:
        raise UsageError(f"max-new-tokens must be at least 1; got {max_new_tokens}")
    found, statistics = options.load_artifacts(plan, calibration)
    loaded = options.load(model, dtype, device, revision, trust_remote_code, quantize)
    artifact = found or statistics
    if artifact is not None:
        artifact.document.model.check(identify(loaded.model, loaded.name))
    ids = encode_prompt(loaded.model, loaded.tokenizer, prompt, raw)
    if allowed is not None:
        found = options.recommended(
            loaded,
            statistics or options.own_calibration(loaded, seed),
            allowed,
            method,
            allocation,
            selection,
            include_head,
            limit_text,
        ).plan
    else:
        found = options.find_plan(
            loaded,
            found,
            statistics,
            sparsity,
            method,
            allocation,
            selection,
            include_head,
            seed,
            retune,
        )

    def answer(stream: bool) -> Generation:
        room = len(ids) + max(max_new_tokens, WARM_UP)
        mode = options.decode_mode(compile_step)
        decoder = Decoder(loaded.model, room, mode=mode, sampling=sampling)
        # Some tokens first: what is done once (compiling, capturing) is not the model's speed.
        generate(loaded.model, ids, WARM_UP, decoder=decoder)
        on_token, finish = streamer(loaded.tokenizer) if stream else (None, None)
        result = generate(loaded.model, ids, max_new_tokens, sampling, on_token, decoder)
        if finish is not None:
            finish()
        return result

    dense = answer(stream=False) if compare else None
    quality = _quality(loaded, found) if perplexity else None
    sparsify(loaded.model, found, check=False)
    lay_out_for_decode(loaded.model)
    sparse = answer(stream=not (compare or as_json))
    densify(loaded.model)

    content: dict[str, Any] = {
        "model": loaded.name,
        "prompt": prompt,
        "text": _text(loaded.tokenizer, sparse),
        "method": found.document.method,
        "sparsity": _sparsity(found),
        "tokens_per_second": sparse.tokens_per_second,
    }
    if dense is not None:
        content["dense"] = {
            "text": _text(loaded.tokenizer, dense),
            "tokens_per_second": dense.tokens_per_second,
        }
    if quality is not None:
        content["perplexity"] = quality
    if as_json:
        options.print_json(content)
    elif compare:
        _show(content)
    else:
        console.print(
            f"[dim]{content['method']}, {content['sparsity']:.1%} of weights not touched, "
            f"{content['tokens_per_second']:.1f} tokens/s[/dim]",
            highlight=False,
        )


def streamer(tokenizer: Tokenizer) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Return a function that prints each token's text when it is whole, and one that ends."""
    text = TextStreamer(tokenizer, skip_special_tokens=True)
    return lambda token: text.put(torch.tensor([token])), text.end


def _quality(loaded: LoadedModel, plan: Plan) -> dict[str, float]:
    """Return both perplexities on documentation that comes with Python, and what is dropped."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))[: SCORED_TOKENS * 8]
    start = start_ids(loaded.model, loaded.tokenizer)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:SCORED_TOKENS]
    limit = context_limit(loaded.model)
    length = min(SCORED_CONTEXT, limit or SCORED_CONTEXT) - len(start)
    windows = [
        torch.tensor([[*start, *ids[first : first + length]]])
        for first in range(0, len(ids) - length + 1, length)
    ]
    sparse, counter = score_plan(loaded.model, plan, windows, DENSE_PREFIX, "perplexity")
    return {
        "dense": sparse.dense_perplexity,
        "sparse": sparse.perplexity,
        "kl": sparse.kl,
        "sparsity": counter.sparsity,
    }


def _sparsity(plan: Plan) -> float:
    realized = plan.document.realized_sparsity
    return plan.sparsity if realized is None else realized


def _text(tokenizer: Tokenizer, generation: Generation) -> str:
    return str(tokenizer.decode(generation.ids, skip_special_tokens=True))


def _show(content: dict[str, Any]) -> None:
    dense = content["dense"]
    sparse = f"sparse ({content['method']}, {content['sparsity']:.1%} of weights not touched)"
    table = Table("dense", sparse, title=escape(content["prompt"]), show_lines=True)
    table.add_row(escape(dense["text"].strip()), escape(content["text"].strip()))
    table.add_row(
        f"{dense['tokens_per_second']:.1f} tokens/s", f"{content['tokens_per_second']:.1f} tokens/s"
    )
    if quality := content.get("perplexity"):
        table.add_row(
            f"perplexity {quality['dense']:.2f}",
            f"perplexity {quality['sparse']:.2f} at {quality['sparsity']:.1%} "
            f"(KL {quality['kl']:.3f} nats a token)",
        )
        table.caption = "perplexity on Python's language documentation (not calibrated on)"
    Console().print(table)
