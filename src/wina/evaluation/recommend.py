"""The highest sparsity that keeps a promise: bisection on one calibration.

A plan keeps the promise if the one-sided 95 % upper bound of what it loses is within the limits on
each of the texts. What is promised is promised for text like these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from wina.errors import UsageError, WinaError
from wina.evaluation.bounds import FEWEST, Bound, divergence, perplexity_increase
from wina.evaluation.quality import text_windows
from wina.measures import Totals, score_plan
from wina.models import context_limit
from wina.plan import Plan
from wina.progress import note

HIGHEST = 0.9
STEP = 0.01  # of the sparsity that bisection ends with
WINDOW = 256  # tokens: enough windows of little text for a bound
MOST_WINDOWS = 32  # of a text


@dataclass(frozen=True)
class Limits:
    """What may be lost at most.

    Attributes:
        perplexity_increase: perplexity / dense perplexity - 1, such as 0.02.
        kl: mean KL(dense || sparse), nats a token.
    """

    perplexity_increase: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (
            ("max-perplexity-increase", self.perplexity_increase),
            ("max-kl", self.kl),
        ):
            if limit is not None and not limit > 0:
                raise UsageError(f"{name} must be above 0; got {limit}")
        if self.perplexity_increase is None and self.kl is None:
            raise UsageError("give a limit: max-perplexity-increase or max-kl")

    def __str__(self) -> str:
        parts = []
        if self.perplexity_increase is not None:
            parts.append(f"perplexity at most {100 * self.perplexity_increase:.3g} % above dense")
        if self.kl is not None:
            parts.append(f"KL at most {self.kl:.3g} nats a token")
        return " and ".join(parts)


@dataclass(frozen=True)
class Loss:
    """What a plan loses on one text, and the sparsity it realized there."""

    increase: Bound
    kl: Bound
    sparsity: float

    def within(self, limits: Limits) -> bool:
        """Whether the upper bounds hold the limits."""
        pairs = ((self.increase, limits.perplexity_increase), (self.kl, limits.kl))
        return all(
            limit is None or (bound.upper is not None and bound.upper <= limit)
            for bound, limit in pairs
        )


@dataclass(frozen=True)
class Recommendation:
    """The plan, what it loses on each text by name, and all targets that were tried."""

    plan: Plan
    losses: dict[str, Loss]
    tried: dict[float, bool]


def limit_windows(
    model: PreTrainedModel, tokenizer: Tokenizer, path: Path, dense_prefix: int
) -> list[Tensor]:
    """Return short windows, evenly spread over a text, on which limits are to be kept.

    Args:
        model: whose start ids each window begins with.
        tokenizer: the model's.
        path: UTF-8 text file.
        dense_prefix: a window must be longer.

    Raises:
        WinaError: the text is too short for a bound.
    """
    everything = path.stat().st_size  # a token has a byte or more
    size = min(WINDOW, context_limit(model) or WINDOW)
    windows, _ = text_windows(model, tokenizer, [path], everything, size, dense_prefix)
    full = [ids for ids in windows if ids.shape[1] == size]
    _check_count(path.name, len(full))
    count = min(len(full), MOST_WINDOWS)
    return [full[(2 * i + 1) * len(full) // (2 * count)] for i in range(count)]


def measure_loss(
    model: PreTrainedModel, plan: Plan, windows: Sequence[Tensor], dense_prefix: int
) -> Loss:
    """Return what a plan loses on windows of text, each int64 (1, positions)."""
    each: list[Totals] = []
    target = plan.document.target_sparsity
    _, counter = score_plan(model, plan, windows, dense_prefix, f"scoring {target:.1%}", each)
    return Loss(perplexity_increase(each), divergence(each), counter.sparsity)


def recommend(
    model: PreTrainedModel,
    plan_at: Callable[[float], Plan],
    texts: Mapping[str, Sequence[Tensor]],
    limits: Limits,
    *,
    dense_prefix: int = 20,
    highest: float = HIGHEST,
) -> Recommendation:
    """Return the plan of the highest sparsity that keeps the limits on each text.

    Args:
        model: dense; dense again at the end.
        plan_at: makes a plan for a target sparsity, from one calibration.
        texts: windows by name of text, which calibration has not read.
        limits: what may be lost.
        dense_prefix: first positions of each window, dense and not scored.
        highest: no plan beyond this is tried.

    Raises:
        WinaError: too few windows, or no sparsity of a step or more keeps the limits.
    """
    for name, windows in texts.items():
        _check_count(name, len(windows))
    tried: dict[float, bool] = {}
    best: tuple[Plan, dict[str, Loss]] | None = None
    # Whole steps: low keeps the limits, high does not or was never asked for.
    low, high = 0, round(highest / STEP) + 1
    while high - low > 1:
        middle = (low + high) // 2
        target = round(middle * STEP, 6)
        plan = plan_at(target)
        losses: dict[str, Loss] = {}
        for name, windows in texts.items():
            losses[name] = measure_loss(model, plan, windows, dense_prefix)
            if not losses[name].within(limits):
                break
        holds = all(loss.within(limits) for loss in losses.values())
        tried[target] = holds
        # The text that decided, or the one that loses most.
        name, worst = max(
            losses.items(),
            key=lambda pair: (not pair[1].within(limits), pair[1].increase.estimate),
        )
        note(
            f"{target:.0%} on {name}: perplexity {worst.increase.estimate:+.2%} (at most "
            f"{worst.increase.upper or 0:+.2%}), KL {worst.kl.estimate:.4f} (at most "
            f"{worst.kl.upper or 0:.4f}): {'within' if holds else 'beyond'} the limit"
        )
        if holds:
            low, best = middle, (plan, losses)
        else:
            high = middle
    if best is None:
        raise WinaError(f"no sparsity from {STEP:.0%} on keeps {limits}; allow more, or tune")
    plan, losses = best
    # Of the text where it was lowest: what is promised at least.
    realized = min(loss.sparsity for loss in losses.values())
    document = plan.document.model_copy(update={"realized_sparsity": realized})
    return Recommendation(replace(plan, document=document), losses, tried)


def _check_count(name: str, count: int) -> None:
    if count < FEWEST:
        raise WinaError(
            f"{name} makes {count} windows, too few for a bound; it takes {FEWEST}: give more text"
        )
