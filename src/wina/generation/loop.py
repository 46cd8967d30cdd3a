"""The decode loop around an unmodified Transformers model, dense and sparse alike.

Transformers' own ``generate`` works with sparse models too, but spends a millisecond or more of
Python a token, which would eat the gain and make any comparison one of overheads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from wina.errors import UsageError
from wina.generation.decoder import Decoder
from wina.generation.sampling import Sampling
from wina.models import context_limit


@dataclass
class Generation:
    """What came out, and how fast.

    Attributes:
        ids: the new tokens, without the one that ended the text.
        prefill_seconds: until the first token was known.
        decode_seconds: all later tokens together.
    """

    ids: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second, prefill not counted; 0 if only one token came."""
        return self.decoded / self.decode_seconds if self.decoded else 0.0


def generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_token: Callable[[int], None] | None = None,
    decoder: Decoder | None = None,
) -> Generation:
    """Generate until an end token or ``max_new_tokens``.

    Args:
        model: dense or sparse. A sparse model's prompt is prefilled as its plan says, and each
            later position is sparse.
        prompt: token ids, at least one.
        max_new_tokens: at least one.
        sampling: how tokens are drawn; None is greedy, or the decoder's way.
        on_token: called with each new token; on CUDA one step after it was computed.
        decoder: one that was made for this model as it is; None makes one for this call. What
            it compiled serves again, so give it where several prompts follow each other.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the model's context or in the
            decoder.
    """
    limit = context_limit(model)
    if not prompt:
        raise UsageError("the prompt is empty")
    if max_new_tokens < 1:
        raise UsageError(f"max-new-tokens must be at least 1; got {max_new_tokens}")
    if limit and len(prompt) >= limit:
        raise UsageError(f"the prompt has {len(prompt)} tokens; the model's context is {limit}")
    room = min(max_new_tokens, limit - len(prompt)) if limit else max_new_tokens
    if decoder is None:
        decoder = Decoder(model, len(prompt) + room, sampling=sampling)
    elif len(prompt) + room > decoder.capacity:
        raise UsageError(
            f"{len(prompt)} tokens and {room} more do not fit the decoder's {decoder.capacity}"
        )
    elif sampling is not None:
        decoder.reseed(sampling.seed)
    ends = _end_tokens(model)
    result = Generation()

    begin = time.perf_counter()
    decoder.prefill([list(prompt)])
    tokens = _tokens(decoder, room)
    token: int | None = next(tokens)
    result.prefill_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    while token is not None and token not in ends:
        result.ids.append(token)
        if on_token is not None:
            on_token(token)
        token = next(tokens, None)
        result.decoded += token is not None
    result.decode_seconds = time.perf_counter() - begin
    return result


def _tokens(decoder: Decoder, count: int) -> Iterator[int]:
    """Yield the token after the prompt and those that follow, ``count`` in all.

    On CUDA a step is launched before the token of the one before it is read, so that the device
    never waits for the host; the last of them may be in vain.
    """
    if decoder.token.device.type != "cuda":
        for number in range(count):
            if number > 0:
                decoder.step()
            yield int(decoder.token)
        return
    tokens = torch.empty(count, dtype=torch.int64, pin_memory=True)
    events: list[Any] = [torch.cuda.Event() for _ in range(count)]  # type: ignore[no-untyped-call]
    for number in range(count + 1):
        if number < count:
            if number > 0:
                decoder.step()
            tokens[number].copy_(decoder.token[0, 0], non_blocking=True)
            events[number].record()
        if number > 0:
            events[number - 1].synchronize()
            yield int(tokens[number - 1])


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {int(ends)}
