"""How the next token is drawn, on the model's device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wina.errors import UsageError
from wina.kernels import most_likely


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


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Return the next token of each row, int64 (batch,), without waiting for the device.

    Args:
        logits: shape (batch, vocabulary).
        sampling: how.
        generator: of the logits' device.
    """
    if sampling.temperature == 0:
        return most_likely(logits)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # The token that crosses top_p stays.
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    # The first of independent exponential waits of rate p_i is i with probability p_i.
    waits = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waits).argmax(-1)
