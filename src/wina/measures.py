"""What is measured of logits: likelihood, divergence, agreement. In chunks, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from wina.layers import SparsityCounter, scoring, widened
from wina.plan import Plan
from wina.progress import track

CHUNK = 256  # positions; a chunk's float32 logits are the peak, 256 x 262k x 4 bytes = 268 MB


@dataclass
class Totals:
    """Sums over scored positions; ``+`` adds those of another text.

    Attributes:
        positions: number of scored positions.
        nll: negative log likelihood of the next token, nats.
        dense_nll: the dense model's; 0 where there was none to compare with.
        divergence: KL(dense || sparse), nats.
        agreed: positions where both put the same token first.
    """

    positions: int = 0
    nll: float = 0.0
    dense_nll: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.positions + other.positions,
            self.nll + other.nll,
            self.dense_nll + other.dense_nll,
            self.divergence + other.divergence,
            self.agreed + other.agreed,
        )

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log likelihood."""
        return _exp(self.nll / max(self.positions, 1))

    @property
    def dense_perplexity(self) -> float:
        """The dense model's perplexity on the same positions."""
        return _exp(self.dense_nll / max(self.positions, 1))

    @property
    def kl(self) -> float:
        """Mean KL(dense || sparse), nats a token."""
        return self.divergence / max(self.positions, 1)

    @property
    def agreement(self) -> float:
        """Share of positions where both put the same token first."""
        return self.agreed / max(self.positions, 1)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@torch.no_grad()
def compare(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> Totals:
    """Score logits against the next tokens and, if given, against the dense model's logits.

    Args:
        logits: shape (positions, vocabulary), any float dtype.
        targets: next tokens, shape (positions,).
        dense: the dense model's logits at the same positions.
    """
    totals = Totals()
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        log_p = logits[part].float().log_softmax(-1)
        nll = functional.nll_loss(log_p, targets[part], reduction="sum")
        dense_nll = divergence = agreed = log_p.new_zeros(())
        if dense is not None:
            log_q = dense[part].float().log_softmax(-1)
            dense_nll = functional.nll_loss(log_q, targets[part], reduction="sum")
            divergence = functional.kl_div(log_p, log_q, log_target=True, reduction="sum")
            agreed = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        totals += Totals(
            len(targets[part]), float(nll), float(dense_nll), float(divergence), int(agreed)
        )
    return totals


@torch.no_grad()
def score_plan(
    model: PreTrainedModel,
    plan: Plan,
    windows: Sequence[Tensor],
    dense_prefix: int,
    what: str,
    each: list[Totals] | None = None,
) -> tuple[Totals, SparsityCounter]:
    """Score a plan against the dense model on the same windows.

    Args:
        model: dense; dense again at the end.
        plan: what to drop.
        windows: token ids, each of shape (1, positions).
        dense_prefix: first positions of each window, dense and not scored.
        what: the progress bar's name.
        each: gets the totals of each window.
    """
    totals = Totals()
    with (
        widened(model),
        scoring(model, plan, dense_prefix) as phase,
        SparsityCounter(model, read_weights=True) as counter,
    ):
        for window in track(windows, what, len(windows)):
            ids = window.to(model.device)
            with phase.force("dense"):
                dense = model(ids, use_cache=False).logits[0, dense_prefix:-1]
            logits = model(ids, use_cache=False).logits[0, dense_prefix:-1]
            found = compare(logits, ids[0, dense_prefix + 1 :], dense)
            totals += found
            if each is not None:
                each.append(found)
    return totals, counter
