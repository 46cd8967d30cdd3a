"""From a calibration to a plan, and to a better one when the model is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina.allocation import allocate_greedily, allocations, build_plan
from wina.calibration.artifact import Calibration, Verdict
from wina.calibration.collect import Sums, add_scores, score_counts
from wina.criteria import Criterion, criteria
from wina.errors import UsageError
from wina.layers import SparsityCounter, scoring, widened
from wina.measures import score_plan
from wina.models import run_body
from wina.plan import Plan
from wina.progress import track
from wina.selection import Selection, check_selection, check_sparsity
from wina.statistics import LinearStatistics

TOLERANCE = 0.005  # of the realized sparsity on held-out text
ROUNDS = 5
REFINE_TOKENS = 16_384  # calibration tokens that a round of refinement reads
GREEDY_TOKENS = 2_048
VERDICT_SPARSITY = 0.5


def make_plan(
    calibration: Calibration,
    sparsity: float,
    method: str = "wina",
    allocation: str | None = None,
    selection: str = "threshold",
    *,
    include_head: bool = False,
    model: PreTrainedModel | None = None,
    refine: bool = False,
) -> Plan:
    """Return a plan for any sparsity; in seconds, without the model unless it is needed.

    Args:
        calibration: the statistics.
        sparsity: share of the planned linears' weights that a decoded token shall not touch.
        method: a criterion's name.
        allocation: uniform, global or greedy; None is what the calibration's verdict says.
        selection: threshold or topk.
        include_head: put lm_head under the same budget.
        model: the dense model; greedy and ``refine`` need it.
        refine: collect the statistics again on the sparse model until the sparsity realized on
            held-out text is within 0.5 points of the target.

    Raises:
        UsageError: an unknown name, a sparsity outside [0, 1), or the model is needed.
    """
    check_sparsity(sparsity)
    criterion = criteria.get(method)
    chosen = check_selection(selection)
    if allocation is None:
        allocation = default_allocation(calibration)
    if model is None and (refine or allocation == "greedy"):
        what = "--refine" if refine else "allocation 'greedy'"
        raise UsageError(f"{what} needs the model itself: add --model MODEL")
    statistics = calibration.linears(include_head)

    if allocation == "greedy":
        assert model is not None
        with widened(model):
            fixed = _greedy(calibration, statistics, criterion, chosen, sparsity, model)
    else:
        fixed = None
        allocations.get(allocation)

    def plan_from(found: Sequence[LinearStatistics], target: float) -> Plan:
        assert allocation is not None
        share = allocations.get(allocation)(found, criterion, target) if fixed is None else fixed
        return build_plan(
            found,
            criterion,
            share,
            chosen,
            model=calibration.document.model,
            allocation=allocation,
            target=sparsity,
            calibration={
                "source": calibration.document.source,
                "tokens": calibration.document.tokens,
                "seed": calibration.document.seed,
                "refined": refine,
            },
            include_head=include_head,
        )

    plan = plan_from(statistics, sparsity)
    if not refine or sparsity == 0:
        return plan
    assert model is not None
    with widened(model):
        return _refined(calibration, statistics, criterion, plan, plan_from, model)


def default_allocation(calibration: Calibration) -> str:
    """Return the allocation that lost less on held-out text, uniform if that was not measured."""
    verdict = calibration.document.verdict
    return "uniform" if verdict is None else verdict.best


def judge(calibration: Calibration, model: PreTrainedModel, method: str = "loss") -> Verdict:
    """Measure uniform against global at 50 % on held-out text, both refined."""
    kl, sparsity = {}, {}
    for allocation in ("uniform", "global"):
        plan = make_plan(
            calibration, VERDICT_SPARSITY, method, allocation, model=model, refine=True
        )
        windows, skip = calibration.windows(held_out=True), calibration.document.dense_prefix
        totals, counter = score_plan(model, plan, windows, skip, f"judging {allocation}")
        kl[allocation], sparsity[allocation] = totals.kl, counter.sparsity
    return Verdict(method=method, target_sparsity=VERDICT_SPARSITY, kl=kl, sparsity=sparsity)


def _refined(
    calibration: Calibration,
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,
    plan: Plan,
    plan_from: Callable[[Sequence[LinearStatistics], float], Plan],
    model: PreTrainedModel,
) -> Plan:
    """Meet the target on held-out text; the plan's document then says what was realized."""
    target = aim = plan.document.target_sparsity
    realized = realized_sparsity(calibration, model, plan).sparsity
    best = plan, realized
    for round_number in range(ROUNDS):
        if abs(realized - target) <= TOLERANCE or plan.document.selection == "topk":
            break
        statistics = _recollected(calibration, statistics, criterion, plan, model)
        if round_number > 0:
            aim = min(max(aim + target - realized, 0.0), 0.999)
        plan = plan_from(statistics, aim)
        realized = realized_sparsity(calibration, model, plan).sparsity
        if abs(realized - target) < abs(best[1] - target):
            best = plan, realized
    plan, realized = best
    return replace(plan, document=plan.document.model_copy(update={"realized_sparsity": realized}))


@torch.no_grad()
def realized_sparsity(
    calibration: Calibration, model: PreTrainedModel, plan: Plan
) -> SparsityCounter:
    """Return what a plan drops on held-out text."""
    windows = calibration.windows(held_out=True)
    head = plan.document.include_head
    with (
        scoring(model, plan, calibration.document.dense_prefix),
        SparsityCounter(model) as counter,
    ):
        for ids in track(windows, "measuring sparsity", len(windows)):
            run_body(model, ids.to(model.device), head)
    return counter


def _recollected(
    calibration: Calibration,
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,
    plan: Plan,
    model: PreTrainedModel,
) -> list[LinearStatistics]:
    """Return the statistics with the criterion's histograms as the sparse model sees them."""
    skip = calibration.document.dense_prefix
    sites = [linear.site for linear in statistics]
    scales = {
        linear.site.name: criterion.scale(linear.facts).float().to(model.device)
        for linear in statistics
    }
    windows = calibration.windows(limit=max(1, REFINE_TOKENS // calibration.document.window))
    sums: Sums = {}
    with scoring(model, plan, skip):
        for ids in track(windows, "refining", len(windows)):
            ids = ids.to(model.device)
            add_scores(model, sites, {criterion.name: scales}, ids, skip, sums)
    counts = score_counts(statistics, criterion, sums)
    return [
        replace(linear, histograms={criterion.name: counts[linear.site.name]})
        for linear in statistics
    ]


def _greedy(
    calibration: Calibration,
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,
    selection: Selection,
    target: float,
    model: PreTrainedModel,
) -> Tensor:
    count = max(1, GREEDY_TOKENS // calibration.document.window)
    ids = torch.cat(calibration.windows(limit=count))[:, :GREEDY_TOKENS].to(model.device)
    prefix = calibration.document.dense_prefix
    return allocate_greedily(model, ids, statistics, criterion, selection, target, prefix)
