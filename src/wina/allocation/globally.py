"""Global: one Lagrange multiplier over the whole model.

Dropping x_j costs about score^2 nats and saves out_features weights. The least cost at a given
number of saved weights drops exactly where score^2 / out_features < lambda^2, with one lambda for
all linears. lambda is found by bisection on the histograms.

An expert's linear costs and saves only on the tokens routed to it, so the rule for a token stays
as it is; only the sum that must meet the target weighs each linear with its usage.

Criteria whose scores are not in nats get one loss scale a linear first:
gamma^2 = sum_j E[x_j^2] g_j^2 / sum_j E[x_j^2] s_j^2, g_j = rms of dL/dx_j weighted by x_j^2, so
that the linear's scores have in total the cost that gradients say its inputs have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wina.allocation.base import allocations
from wina.criteria import Criterion
from wina.errors import UsageError
from wina.statistics import LinearStatistics, cumulative, share_below

BISECTIONS = 60


def loss_scale(statistics: LinearStatistics, criterion: Criterion) -> float:
    """Return gamma of one linear; raise UsageError if gradients were not collected."""
    if criterion.comparable:
        return 1.0
    if statistics.gradient_rms is None:
        raise UsageError(
            "allocation 'global' needs gradients, which this calibration lacks; calibrate "
            "again without --no-gradient, or use --allocation uniform"
        )
    power = statistics.mean_square.double()
    cost = (power * statistics.gradient_rms.double().square()).sum()
    score = (power * criterion.scale(statistics.facts).double().square()).sum()
    return float((cost / score.clamp(min=1e-300)).sqrt())


def allocate_globally(
    statistics: Sequence[LinearStatistics], criterion: Criterion, target: float
) -> Tensor:
    """Return each linear's sparsity under one multiplier; together they meet the target."""
    if target == 0:
        return torch.zeros(len(statistics), dtype=torch.float64)
    cumulated = cumulative(torch.stack([x.counts(criterion) for x in statistics]))
    weights = torch.tensor([x.cost for x in statistics], dtype=torch.float64)
    # A linear's own scores fall below lambda / unit.
    unit = torch.tensor(
        [loss_scale(x, criterion) / x.site.out_features**0.5 for x in statistics],
        dtype=torch.float64,
    ).clamp(min=1e-30)
    low, high = -100.0, 100.0  # log2 of lambda
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        cutoff = (2.0**middle / unit).clamp(max=1e30)
        sparsity = share_below(cumulated, cutoff)
        if (sparsity * weights).sum() < target * weights.sum():
            low = middle
        else:
            high = middle
    return sparsity


allocations.add("global", allocate_globally)
