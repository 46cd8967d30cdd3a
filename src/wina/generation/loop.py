"""The decode loop around an unmodified Transformers model, dense and sparse alike.

Transformers' own ``generate`` works with sparse models too, but spends a millisecond or more of
Python a token, which would eat the gain and make any comparison one of overheads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from wina.errors import UsageError
from wina.layers import phase_of


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: draw from the smallest set of tokens with this much probability.
        seed: of the draw.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"temperature must not be negative; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must lie in (0, 1]; got {self.top_p}")


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


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Generate until an end token or ``max_new_tokens``.

    Args:
        model: dense or sparse. A sparse model's prompt is prefilled as its plan says, and each
            later position is sparse.
        prompt: token ids, at least one.
        max_new_tokens: at least one.
        sampling: how tokens are drawn; None is greedy.
        on_token: called with each new token.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the model's context.
    """
    sampling = sampling or Sampling()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not prompt:
        raise UsageError("the prompt is empty")
    if max_new_tokens < 1:
        raise UsageError(f"max-new-tokens must be at least 1; got {max_new_tokens}")
    if limit and len(prompt) >= limit:
        raise UsageError(f"the prompt has {len(prompt)} tokens; the model's context is {limit}")
    room = min(max_new_tokens, limit - len(prompt)) if limit else max_new_tokens
    ends = _end_tokens(model)
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    phase = phase_of(model)
    cache = DynamicCache(config=model.config)
    result = Generation()

    def forward(ids: Tensor) -> int:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        return _draw(logits.float(), sampling, generator)

    begin = time.perf_counter()
    ids = torch.tensor([list(prompt)], device=model.device)
    token = forward(ids)
    result.prefill_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    while token not in ends:
        result.ids.append(token)
        if on_token is not None:
            on_token(token)
        if len(result.ids) == room:
            break
        step = torch.tensor([[token]], device=model.device)
        if phase is None:
            token = forward(step)
        else:
            with phase.force("sparse"):
                token = forward(step)
        result.decoded += 1
    result.decode_seconds = time.perf_counter() - begin
    return result


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # The token that crosses top_p stays.
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {int(ends)}
