"""What the benchmark times: ways to decode, each a function that decodes some tokens once more."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from wina.bench.probe import synchronize
from wina.generation import Decoder

Contender = Callable[[int], float]  # decodes so many tokens; returns seconds for each


def own_loop(decoder: Decoder, context: int) -> Contender:
    """Return wina's decode loop, always at the same context."""

    def run(tokens: int) -> float:
        decoder.seek(context)
        device = decoder.token.device
        synchronize(device)
        start = time.perf_counter()
        for _ in range(tokens):
            decoder.step()
        synchronize(device)
        return (time.perf_counter() - start) / tokens

    return run


def decoder_at(
    model: PreTrainedModel, prompt: Tensor, context: int, tokens: int, mode: Any
) -> tuple[Decoder, float]:
    """Return a decoder after a prompt, compiled and captured, and the prompt's seconds.

    Where the context is longer than the prompt, the positions between hold zeros: decoding takes
    the same time, whatever keys and values are.
    """
    decoder = Decoder(model, context + tokens + 1, batch=len(prompt), mode=mode)
    decoder.prefill(prompt)
    synchronize(prompt.device)
    start = time.perf_counter()
    decoder.prefill(prompt)
    synchronize(prompt.device)
    seconds = time.perf_counter() - start
    decoder.seek(context)
    for _ in range(min(tokens, 5)):
        decoder.step()
    return decoder, seconds


def prepacked(
    model: PreTrainedModel, prompt: Tensor, context: int, tokens: int, mode: Any
) -> tuple[Decoder, float]:
    """As ``decoder_at``, with the weights packed by oneDNN beforehand: a second copy of them."""
    del mode
    with inductor.patch(freezing=True):
        return decoder_at(model, prompt, context, tokens, "compiled")


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_generate(
    model: PreTrainedModel, prompt: Tensor, tokens: int, compiled: bool
) -> Contender:
    """Return Transformers' own ``generate``, eager or compiled with a static cache.

    The time of a token is that between the first and the last one, so that the prompt is not
    part of it.
    """
    options: dict[str, Any] = {}
    if compiled:
        setup = CompileConfig(fullgraph=True, mode="default")
        if model.device.type == "cuda":
            setup = CompileConfig(fullgraph=True, mode="reduce-overhead")
        setup._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": setup}
    settings = GenerationConfig(
        max_new_tokens=tokens + 1,
        min_new_tokens=tokens + 1,
        do_sample=False,
        pad_token_id=0,
        **options,
    )

    def run(tokens: int) -> float:
        settings.max_new_tokens = settings.min_new_tokens = tokens + 1
        clock = _Clock()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            streamer=clock,
        )
        synchronize(prompt.device)
        # The prompt itself is put first, and the first token belongs to it.
        return (time.perf_counter() - clock.times[1]) / tokens

    return run
