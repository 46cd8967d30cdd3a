"""Score plans on text against the dense model: the same windows, the same weights, one pass each.

Every position after the dense prefix of each window is sparse and scored. Each window starts as
the tokenizer starts a fresh text.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from wina.allocation.build import versions
from wina.calibration.text import read_text
from wina.cost import token_bytes
from wina.errors import UsageError
from wina.evaluation.bounds import divergence, perplexity_increase
from wina.files import kept
from wina.layers import widened
from wina.measures import Totals, compare, score_plan
from wina.models import context_limit, start_ids
from wina.plan import Plan, PlannedLinear
from wina.progress import track

CONTEXT = 2_048
OWN_TEXT = "Python's own documentation"


class DenseResult(BaseModel):
    """The dense model's perplexity."""

    perplexity: float


class Window(BaseModel):
    """One window's positions and sums over them: negative log likelihoods and KL, nats."""

    positions: int
    nll: float
    dense_nll: float
    kl: float


class SparseResult(BaseModel):
    """What one plan loses.

    Attributes:
        sparsity: realized: the share of the planned linears' weights not touched.
        kl: mean KL(dense || sparse), nats a token.
        top1_agreement: share of positions where both models put the same token first.
        by_kind: realized sparsity of each kind of projection.
        by_block: realized sparsity of each decoder block.
        by_place: realized sparsity of each kind of projection in each block.
        bytes: that a token reads: of the planned linears, the head and all that the plan adds;
            ``dense_bytes`` the dense model's.
        increase: perplexity / the dense model's - 1; ``increase_upper`` and ``kl_upper`` are
            one-sided 95 % upper bounds, windows being the units; None for too few of them.
        windows: what each window contributed.
    """

    method: str
    allocation: str
    selection: str
    target_sparsity: float
    sparsity: float
    perplexity: float
    kl: float
    top1_agreement: float
    by_kind: dict[str, float]
    by_block: dict[int, float]
    by_place: dict[str, dict[int, float]] = {}
    bytes: float = 0.0
    dense_bytes: float = 0.0
    increase: float = 0.0
    increase_upper: float | None = None
    kl_upper: float | None = None
    windows: list[Window] = []


class Evaluation(BaseModel):
    """One evaluation: settings, the dense model, and a result for each plan.

    ``text_hash`` is the SHA-256 of the windows' ids: evaluations with equal ones can be compared
    window by window.
    """

    model: str
    text: list[str]
    text_hash: str = ""
    tokens: int
    scored_positions: int
    context: int
    dense_prefix: int
    start: list[int]
    device: str
    dtype: str
    versions: dict[str, str]
    dense: DenseResult
    results: list[SparseResult]


def text_windows(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    tokens: int,
    context: int,
    dense_prefix: int,
) -> tuple[list[Tensor], list[int]]:
    """Return windows of text, each int64 (1, positions), and the ids each of them starts with.

    Args:
        model: its context limits the windows.
        tokenizer: the model's.
        paths: UTF-8 text files, one after the other; none takes Python's own documentation.
        tokens: how many tokens to score at most, the windows' start ids not counted.
        context: positions of a window, start ids included.
        dense_prefix: a window must be longer.

    Raises:
        UsageError: not UTF-8, too little text, or a context that the model cannot hold.
    """
    if tokens < 1 or dense_prefix < 0:
        raise UsageError("tokens must be at least 1, and the dense prefix not negative")
    limit = context_limit(model)
    if limit and context > limit:
        raise UsageError(f"the model's context is {limit} positions, {context} were asked for")
    start = start_ids(model, tokenizer)
    length = context - len(start)
    if length <= dense_prefix + 1:
        raise UsageError("the dense prefix leaves nothing of the context to score")
    text = "".join(read_text(path) for path in paths) if paths else own_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    if len(ids) <= dense_prefix + 1:
        raise UsageError(
            f"the text has {len(ids)} tokens, too few to score after {dense_prefix} dense ones"
        )
    windows = [
        torch.tensor([[*start, *ids[first : first + length]]])
        for first in range(0, len(ids), length)
    ]
    return [x for x in windows if x.shape[1] > dense_prefix + 1], start


def own_text() -> str:
    """Return a text that every Python carries, and that nothing here is calibrated on."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    plans: Iterable[Plan],
    paths: Sequence[Path],
    *,
    name: str,
    tokens: int,
    context: int | None = None,
    dense_prefix: int = 20,
    work: Path | None = None,
) -> Evaluation:
    """Score the dense model and each plan on text.

    Args:
        model: dense, in evaluation mode; dense again at the end.
        tokenizer: its tokenizer.
        plans: what to score, in order.
        paths: UTF-8 text files; none takes Python's own documentation.
        name: of the model, for the record.
        tokens: how many tokens of the text at most.
        context: positions of a window; None is 2,048 or the model's if less.
        dense_prefix: first positions of a window, dense and not scored.
        work: a folder where each result is kept as it comes, and found when started again; what
            is in it must be of the same model, plans and settings.
    """
    context = min(CONTEXT, context_limit(model) or CONTEXT) if context is None else context
    windows, start = text_windows(model, tokenizer, paths, tokens, context, dense_prefix)

    def result_of(plan: Plan, number: int) -> SparseResult:
        path = None if work is None else work / f"quality-{number}.json"
        return kept(path, SparseResult, lambda: _score(model, plan, windows, dense_prefix))

    dense = kept(
        None if work is None else work / "quality-dense.json",
        DenseResult,
        lambda: _score_dense(model, windows, dense_prefix),
    )
    results = [result_of(plan, number) for number, plan in enumerate(plans)]
    return Evaluation(
        model=name,
        text=[path.name for path in paths] or [OWN_TEXT],
        text_hash=_digest(windows),
        tokens=sum(window.shape[1] - len(start) for window in windows),
        scored_positions=sum(window.shape[1] - dense_prefix - 1 for window in windows),
        context=context,
        dense_prefix=dense_prefix,
        start=start,
        device=_device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=versions(),
        dense=dense,
        results=results,
    )


def _score_dense(
    model: PreTrainedModel, windows: Sequence[Tensor], dense_prefix: int
) -> DenseResult:
    totals = Totals()
    with widened(model):
        for ids in track(windows, "dense", len(windows)):
            ids = ids.to(model.device)
            logits = model(ids, use_cache=False).logits[0, dense_prefix:-1]
            totals += compare(logits, ids[0, dense_prefix + 1 :])
    return DenseResult(perplexity=totals.perplexity)


def _digest(windows: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numpy().tobytes())
    return digest.hexdigest()


def _score(
    model: PreTrainedModel, plan: Plan, windows: Sequence[Tensor], dense_prefix: int
) -> SparseResult:
    document = plan.document
    what = f"{document.method} {document.allocation} {document.target_sparsity:.0%}"
    each: list[Totals] = []
    totals, counter = score_plan(model, plan, windows, dense_prefix, what, each)
    shares = counter.by_linear()
    kinds = dict.fromkeys(x.kind for x in document.linears.values() if x.block is not None)
    read, dense = token_bytes(model, plan, counter)
    return SparseResult(
        increase=perplexity_increase(each).estimate,
        increase_upper=perplexity_increase(each).upper,
        kl_upper=divergence(each).upper,
        windows=[
            Window(positions=x.positions, nll=x.nll, dense_nll=x.dense_nll, kl=x.divergence)
            for x in each
        ],
        method=document.method,
        allocation=document.allocation,
        selection=document.selection,
        target_sparsity=document.target_sparsity,
        sparsity=counter.sparsity,
        perplexity=totals.perplexity,
        kl=totals.kl,
        top1_agreement=totals.agreement,
        by_kind=_grouped(plan, shares, lambda linear: linear.kind),
        by_block=_grouped(plan, shares, lambda linear: linear.block),
        by_place={kind: _grouped(plan, shares, _block_if(kind)) for kind in kinds},
        bytes=read,
        dense_bytes=dense,
    )


def _grouped(plan: Plan, shares: dict[str, float], key: Any) -> dict[Any, float]:
    """Return the weighted mean sparsity of each group of linears; those without a key are left."""
    dropped: dict[Any, float] = {}
    total: dict[Any, float] = {}
    for name, share in shares.items():
        linear = plan.document.linears[name]
        group, weights = key(linear), linear.cost
        if group is not None:
            dropped[group] = dropped.get(group, 0.0) + share * weights
            total[group] = total.get(group, 0.0) + weights
    return {group: dropped[group] / total[group] for group in total if total[group]}


def _block_if(kind: str) -> Callable[[PlannedLinear], int | None]:
    return lambda linear: linear.block if linear.kind == kind else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
