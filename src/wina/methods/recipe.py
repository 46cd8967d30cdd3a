"""Methods that are a criterion, an allocation and a selection, maybe in a basis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wina.allocation import build_plan, greedy_path
from wina.calibration import Calibration, make_plan
from wina.calibration.rotated import find_bases, in_bases, recollect, with_bases
from wina.criteria import Criterion, criteria
from wina.methods.base import Setting
from wina.models import blocks
from wina.plan import Plan
from wina.selection import Selection
from wina.statistics import LinearStatistics


def recipe(
    criterion: str, allocation: str, selection: Selection, basis: str | None = None
) -> Callable[[Setting, float], Plan]:
    """Return what makes plans of a criterion, an allocation and a selection.

    Args:
        criterion: its name.
        allocation: uniform, global or greedy.
        selection: how channels are chosen; threshold plans are refined.
        basis: name of the basis that linears run in; statistics and searches see it too.
    """

    def make(setting: Setting, sparsity: float) -> Plan:
        if basis is None:
            return planned(setting, setting.calibration, sparsity)
        model = setting.model
        found = setting.once(
            ("basis", basis), lambda: find_bases(model, basis, setting.calibration)
        )
        with in_bases(model, found):
            calibration = setting.once(
                ("statistics", basis), lambda: recollect(model, setting.calibration)
            )
            return with_bases(planned(setting, calibration, sparsity), found)

    def planned(setting: Setting, calibration: Calibration, sparsity: float) -> Plan:
        if selection == "threshold" and allocation != "greedy":
            return make_plan(
                calibration, sparsity, criterion, allocation, model=setting.model, refine=True
            )
        statistics = calibration.linears(include_head=False)
        chosen = criteria.get(criterion)
        if allocation == "greedy":
            key = ("greedy", basis, criterion, selection, setting.seed)
            shares = greedy(setting, key, statistics, chosen, selection, sparsity)
        else:
            shares = torch.full((len(statistics),), sparsity, dtype=torch.float64)
        return assemble(setting, statistics, chosen, shares, selection, allocation, sparsity)

    return make


def greedy(
    setting: Setting,
    key: Any,
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,
    selection: Selection,
    sparsity: float,
) -> Tensor:
    """Return greedy shares; one search serves all of the setting's sparsities."""
    targets = sorted({*setting.sparsities, sparsity})

    def search() -> Tensor:
        number = len(blocks(setting.model)[1])
        budgets = torch.tensor(targets, dtype=torch.float64)[:, None].repeat(1, number)
        return greedy_path(
            setting.model,
            search_ids(setting, setting.search_tokens),
            statistics,
            criterion,
            selection,
            budgets,
            setting.calibration.document.dense_prefix,
        )

    return setting.once((key, tuple(targets)), search)[targets.index(sparsity)]


def search_ids(setting: Setting, tokens: int) -> Tensor:
    """Return calibration tokens for a search, shape (windows, positions), on the model's device.

    Each seed takes up where the seed before it ended, and from the start again after the last.
    """
    windows = setting.calibration.windows()
    count = min(max(1, tokens // setting.calibration.document.window), len(windows))
    chosen = [windows[(setting.seed * count + i) % len(windows)] for i in range(count)]
    return torch.cat(chosen)[:, :tokens].to(setting.model.device)


def assemble(
    setting: Setting,
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,
    shares: Tensor,
    selection: Selection,
    allocation: str,
    sparsity: float,
) -> Plan:
    """Return the plan of these shares; ``selection`` is any, those for scoring alone too."""
    document = setting.calibration.document
    plan = build_plan(
        statistics,
        criterion,
        shares,
        "threshold" if selection == "threshold" else "topk",
        model=document.model,
        allocation=allocation,
        target=sparsity,
        calibration={"source": document.source, "tokens": document.tokens, "seed": setting.seed},
    )
    changed = plan.document.model_copy(update={"selection": selection})
    return Plan(changed, plan.vectors, plan.biases, plan.parts)
