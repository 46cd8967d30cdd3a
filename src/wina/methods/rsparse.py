"""R-Sparse: large inputs use their columns of W, the rest goes through a low-rank W.

y = W x_S + A_r B_r x_rest, A_r B_r the best rank-r approximation of W, r and |S| sharing one budget
of weights: |S| / in + r (in + out) / (in out) = 1 - s. How much of the budget is low-rank is chosen
for each linear by its output error on calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wina.criteria import criteria
from wina.methods.base import Method, Setting, register
from wina.methods.probe import dropped_by_topk, for_each_linear
from wina.methods.recipe import assemble
from wina.plan import Extras, Plan
from wina.selection import channels_kept
from wina.statistics import LinearStatistics

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the budget for the low-rank term


@dataclass(frozen=True)
class Split:
    """How one linear's budget is shared, and its low-rank factors.

    Attributes:
        sparsity: share of channels that go through the low-rank term.
        into: B, shape (rank, in_features), float32.
        out: A, shape (out_features, rank), float32.
    """

    sparsity: float
    into: Tensor
    out: Tensor


def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return U S and V^T of W = U S V^T, or U and S V^T: rank r is their first columns and rows.

    By the eigenvectors of the smaller of W^T W and W W^T: W V V^T = U U^T W, rank by rank.
    """
    w = weight.double()
    if w.shape[0] < w.shape[1]:
        u = torch.linalg.eigh(w @ w.T).eigenvectors.flip(-1)
        return u.float(), (u.T @ w).float()
    v = torch.linalg.eigh(w.T @ w).eigenvectors.flip(-1)
    return (w @ v).float(), v.T.float()


def split(x: Tensor, weight: Tensor, u: Tensor, vh: Tensor, sparsity: float) -> Split:
    """Return the split with the least squared error of the output, sum over tokens."""
    out_features, in_features = weight.shape
    best: tuple[float, Split] | None = None
    for share in SHARES:
        budget = (1 - sparsity) * in_features * out_features
        rank = int(share * budget / (in_features + out_features))
        rank = min(rank, len(vh))
        dense = (budget - rank * (in_features + out_features)) / (in_features * out_features)
        keep = channels_kept(in_features, 1 - dense)
        candidate = Split(1 - keep / in_features, vh[:rank], u[:, :rank])
        rest = dropped_by_topk(x, torch.ones(in_features), candidate.sparsity)
        lost = rest @ weight.T - rest @ candidate.into.T @ candidate.out.T
        error = float(lost.square().sum())
        if best is None or error < best[0]:
            best = error, candidate
    assert best is not None
    return best[1]


def rsparse(setting: Setting, sparsity: float) -> Plan:
    """Return the plan: top-k of magnitudes and a low-rank term for what it drops."""
    statistics = setting.calibration.linears(include_head=False)

    def see(linear: LinearStatistics, x: Tensor, weight: Tensor) -> Split:
        u, vh = setting.once(("svd of W", linear.site.name), lambda: factors(weight))
        return split(x, weight, u, vh, sparsity)

    found = for_each_linear(setting, see)
    shares = torch.tensor(
        [found[x.site.name].sparsity if x.site.name in found else sparsity for x in statistics],
        dtype=torch.float64,
    )
    plan = assemble(
        setting, statistics, criteria.get("teal"), shares, "topk", "per linear", sparsity
    )
    ranked = {name: one for name, one in found.items() if len(one.into)}
    if not ranked:
        return plan
    parts = {f"{name}.low_rank_in": one.into.cpu().contiguous() for name, one in ranked.items()}
    parts |= {f"{name}.low_rank_out": one.out.cpu().contiguous() for name, one in ranked.items()}
    extras = Extras(low_ranks={name: len(one.into) for name, one in ranked.items()})
    document = plan.document.model_copy(update={"schema_version": 2, "extras": extras})
    return replace(plan, document=document, parts=parts)


RSPARSE = register(
    Method(
        name="r-sparse",
        paper="R-Sparse, arXiv 2504.19449",
        departures=(
            "top-k instead of thresholds; the low-rank share is searched for each linear by its "
            "output error, not by evolution on the model's loss; one budget for every linear"
        ),
        make=rsparse,
        adds="a low-rank term for what is dropped",
        seeded=True,
    )
)
