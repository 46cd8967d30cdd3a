"""`wina chat`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from wina.api import sparsify
from wina.cli import options
from wina.cli.run import MaxNewTokens, Temperature, TopP, streamer
from wina.errors import UsageError
from wina.generation import Decoder, Sampling, encode_chat, generate
from wina.layers import lay_out_for_decode
from wina.models import identify
from wina.progress import console


def chat(
    model: options.Model = None,
    sparsity: options.Sparsity = 0.5,
    method: options.Method = None,
    allocation: options.Allocation = None,
    selection: options.Selection = "threshold",
    include_head: options.IncludeHead = False,
    plan: options.PlanSource = None,
    calibration: options.CalibrationFolder = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    compile_step: options.Compile = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Talk with a sparse model. An empty line or Ctrl-D ends.

    Examples:
        wina chat

        wina chat HuggingFaceTB/SmolLM2-1.7B-Instruct --sparsity 0.4
    """
    options.check_request(sparsity, method, allocation, selection)
    sampling = Sampling(temperature, top_p, seed)
    found, statistics = options.load_artifacts(plan, calibration)
    loaded = options.load(model, dtype, device, revision, trust_remote_code, quantize)
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise UsageError(f"{loaded.name} has no chat template; use wina run --raw")
    artifact = found or statistics
    if artifact is not None:
        artifact.document.model.check(identify(loaded.model, loaded.name))
    found = options.find_plan(
        loaded, found, statistics, sparsity, method, allocation, selection, include_head, seed
    )
    sparsify(loaded.model, found, check=False)
    lay_out_for_decode(loaded.model)

    decoder: Decoder | None = None
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in range(1_000_000):
        try:
            text = console.input("[bold]you:[/bold] ")
        except EOFError:
            break
        if not text.strip():
            break
        messages.append({"role": "user", "content": text})
        ids = encode_chat(loaded.tokenizer, messages)
        on_token, finish = streamer(loaded.tokenizer)
        room = len(ids) + max_new_tokens
        if decoder is None or room > decoder.capacity:
            mode = options.decode_mode(compile_step)
            decoder = Decoder(loaded.model, 2 * room, mode=mode, sampling=sampling)
        drawn = replace(sampling, seed=seed + turn)
        result = generate(loaded.model, ids, max_new_tokens, drawn, on_token, decoder)
        finish()
        console.print(f"[dim]{result.tokens_per_second:.1f} tokens/s[/dim]", highlight=False)
        reply = loaded.tokenizer.decode(result.ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": reply})
