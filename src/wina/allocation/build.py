"""Turn an allocation into a plan."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from wina.criteria import Criterion
from wina.plan import ModelIdentity, Plan, PlanDocument, PlannedLinear
from wina.selection import Selection, channels_kept
from wina.statistics import LinearStatistics, cumulative, value_at


def build_plan(
    statistics: Sequence[LinearStatistics],
    criterion: Criterion,
    sparsities: Tensor,
    selection: Selection,
    *,
    model: ModelIdentity,
    allocation: str,
    target: float,
    calibration: Mapping[str, Any] | None = None,
    include_head: bool = False,
) -> Plan:
    """Return the plan that gives each linear its sparsity.

    With threshold selection t_j = tau / s_j, tau the quantile of the linear's scores; a channel
    whose scale is zero cannot matter, so its threshold is infinite wherever tau > 0.

    Args:
        statistics: of each linear.
        criterion: the scores.
        sparsities: of each linear, shape (linears,), in [0, 1].
        selection: threshold or topk.
        model: the base model.
        allocation: name of what made ``sparsities``.
        target: what they meet together.
        calibration: facts worth recording, JSON values.
        include_head: lm_head is among the linears.
    """
    linears, vectors = {}, {}
    for linear, share in zip(statistics, sparsities.tolist(), strict=True):
        site = linear.site
        scale = criterion.scale(linear.facts).float()
        keep = None
        if selection == "topk":
            keep = channels_kept(site.in_features, share)
            share = 1 - keep / site.in_features
            vectors[site.name] = scale
        else:
            cumulated = cumulative(linear.counts(criterion))[None]
            cutoff = value_at(cumulated, torch.tensor([share]))
            vectors[site.name] = torch.where(cutoff > 0, cutoff / scale, torch.zeros_like(scale))
        linears[site.name] = PlannedLinear(
            kind=site.kind,
            block=site.block,
            in_features=site.in_features,
            out_features=site.out_features,
            sparsity=share,
            keep=keep,
            usage=linear.usage,
        )
    document = PlanDocument(
        model=model,
        method=criterion.name,
        allocation=allocation,
        selection=selection,
        target_sparsity=target,
        include_head=include_head,
        linears=linears,
        calibration=dict(calibration or {}),
        versions=versions(),
    )
    return Plan(document, vectors)


def versions() -> dict[str, str]:
    """Return the versions that fix how numbers were made."""
    packages = {name: version(name) for name in ("wina", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}
