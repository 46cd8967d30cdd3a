"""WiSparse: |x_j| ||W_:j||^alpha, block budgets by evolution, then refined inside each block.

1. alpha of each linear: the one of a grid with the least output error on calibration text.
2. Budgets of blocks: evolution from equal ones. A mutation moves sparsity from one block to
   another; a candidate's fitness is its KL to the dense model on calibration text.
3. Inside a block: greedy steps on the block's output error, up to the block's budget.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wina.allocation import greedy_path
from wina.criteria import criteria
from wina.layers import scoring
from wina.layers.linear import refresh, sparse_layers
from wina.measures import compare
from wina.methods.base import Method, Setting, register
from wina.methods.probe import dropped_by_topk, for_each_linear
from wina.methods.recipe import assemble, search_ids
from wina.models import blocks
from wina.plan import Plan
from wina.progress import track
from wina.selection import channels_kept
from wina.statistics import LinearStatistics

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
GENERATIONS, OFFSPRING = 12, 4
MUTATION = 0.05  # sparsity that moves
LOWEST, HIGHEST = 0.05, 0.9  # of a block
FITNESS_TOKENS = 512


def best_alpha(norm: Tensor, x: Tensor, weight: Tensor, sparsity: float) -> float:
    """Return the alpha of the grid with the least squared output error of top-k.

    Args:
        norm: ||W_:j||, shape (in_features,).
        x: inputs, shape (tokens, in_features).
        weight: W, shape (out_features, in_features).
        sparsity: share of channels dropped.
    """

    def error(alpha: float) -> float:
        lost = dropped_by_topk(x, norm.to(x.device) ** alpha, sparsity) @ weight.T
        return float(lost.square().sum())

    return min(ALPHAS, key=error)


def mutate(budgets: Sequence[float], draw: random.Random) -> list[float]:
    """Return budgets with sparsity moved from one block to another; their mean stays."""
    changed = list(budgets)
    source, target = draw.sample(range(len(changed)), 2)
    step = min(MUTATION * draw.random(), changed[source] - LOWEST, HIGHEST - changed[target])
    step = max(step, 0.0)
    changed[source] -= step
    changed[target] += step
    return changed


def wisparse(setting: Setting, sparsity: float) -> Plan:
    """Return the plan: scales ||W_:j||^alpha, top-k."""
    alphas = for_each_linear(
        setting,
        lambda linear, x, weight: best_alpha(linear.column_norm, x, weight, sparsity),
    )
    statistics = [
        replace(x, column_norm=x.column_norm ** alphas.get(x.site.name, 1.0))
        for x in setting.calibration.linears(include_head=False)
    ]
    model = setting.model
    number = len(blocks(model)[1])
    budgets = [sparsity] * number
    if number > 1:
        budgets = _evolve(setting, statistics, budgets, sparsity)
    shares = greedy_path(
        model,
        search_ids(setting, setting.search_tokens),
        statistics,
        criteria.get("wina"),
        "topk",
        torch.tensor([budgets], dtype=torch.float64),
        setting.calibration.document.dense_prefix,
    )[0]
    return _plan(setting, statistics, shares, sparsity)


@torch.no_grad()
def _evolve(
    setting: Setting, statistics: list[LinearStatistics], budgets: list[float], sparsity: float
) -> list[float]:
    model, draw = setting.model, random.Random(setting.seed)
    ids = search_ids(setting, FITNESS_TOKENS)[:1]
    skip = setting.calibration.document.dense_prefix
    shares = torch.full((len(statistics),), sparsity, dtype=torch.float64)
    plan = _plan(setting, statistics, shares, sparsity)
    with scoring(model, plan, skip) as phase:
        with phase.force("dense"):
            dense = model(ids, use_cache=False).logits[0, skip:-1]
        layers = dict(sparse_layers(model))

        def fitness(candidate: Sequence[float]) -> float:
            for site in (x.site for x in statistics):
                if site.block is not None:
                    layer = layers[site.name]
                    layer.keep = channels_kept(site.in_features, candidate[site.block])
                    refresh(layer)
            logits = model(ids, use_cache=False).logits[0, skip:-1]
            return compare(logits, ids[0, skip + 1 :], dense).kl

        best = fitness(budgets), budgets
        for _ in track(range(GENERATIONS), "evolution", GENERATIONS):
            children = [mutate(best[1], draw) for _ in range(OFFSPRING)]
            found = [(fitness(child), child) for child in children]
            best = min([best, *found], key=lambda x: x[0])
    return best[1]


def _plan(
    setting: Setting, statistics: list[LinearStatistics], shares: Tensor, sparsity: float
) -> Plan:
    return assemble(
        setting, statistics, criteria.get("wina"), shares, "topk", "evolutionary", sparsity
    )


WISPARSE = register(
    Method(
        name="wisparse",
        paper="WiSparse, arXiv 2602.14452",
        departures=(
            "a small evolution (12 generations of 4, KL on 512 tokens); alpha from a grid of seven "
            "by the linear's output error; top-k"
        ),
        make=wisparse,
        seeded=True,
    )
)
