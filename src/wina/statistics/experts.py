"""Statistics of experts: each from the tokens routed to it, leaning on its layer where few came.

An expert sees only the tokens that are routed to it. Its mean squares and histograms are those of
its own tokens plus those of ``PRIOR`` tokens of the experts of its layer together:
m_e = (sum_e + PRIOR m) / (n_e + PRIOR), m = sum over experts / tokens of all experts.

Experts of a layer share the input of their first projection, so there m is taken channel by
channel; the channels inside one expert have nothing to do with those inside another, so for
``down_proj`` m is the mean over channels. Histograms are pooled in units of each expert's own rms
score, which its weights give, and shifted to those of the expert that leans on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wina.models import Site
from wina.statistics.histogram import BINS, SHIFT

PRIOR = 32.0  # tokens
OCTAVE = 1 << (23 - SHIFT)  # bins


def by_layer(sites: Sequence[Site]) -> list[list[Site]]:
    """Return the sites of experts, those of one projection of one layer together."""
    layers: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        if site.expert is not None:
            owner, _, projection = site.name.rsplit(".", 2)
            layers.setdefault((owner, projection), []).append(site)
    return list(layers.values())


def mean_squares(
    layer: Sequence[Site], totals: Mapping[str, Tensor], rows: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the mean squares of a layer's experts, each (in_features,) float64.

    Args:
        layer: from ``by_layer``.
        totals: sums of squares over the tokens of each expert; one that saw none may be missing.
        rows: tokens of each expert.
    """
    seen = [totals[site.name] for site in layer if site.name in totals]
    count = sum(rows.get(site.name, 0) for site in layer)
    pooled = torch.stack(seen).sum(0) / max(count, 1)
    if layer[0].name.endswith(".down_proj"):
        pooled = pooled.mean().expand_as(pooled)
    return {
        site.name: (totals.get(site.name, 0) + PRIOR * pooled) / (rows.get(site.name, 0) + PRIOR)
        for site in layer
    }


def histograms(
    layer: Sequence[Site],
    counts: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the histograms of the scores of a layer's experts, each (BINS,) int64.

    Args:
        layer: from ``by_layer``.
        counts: histograms over the tokens of each expert; one that saw none may be missing.
        scales: s_j of each expert, shape (in_features,).
        squares: E[x_j^2] of each expert, shape (in_features,).
    """
    octaves = {}
    for site in layer:
        square = squares[site.name].double().cpu() * scales[site.name].double().cpu().square()
        octaves[site.name] = float(square.mean().sqrt().clamp(min=1e-30).log2())
    pooled = torch.zeros(BINS, dtype=torch.float64)
    for site in layer:
        if site.name in counts:
            pooled += _shifted(counts[site.name].double().cpu(), -octaves[site.name])
    pooled *= PRIOR * layer[0].in_features / pooled.sum().clamp(min=1)
    none = torch.zeros(BINS, dtype=torch.int64)
    return {
        site.name: counts.get(site.name, none).cpu()
        + _shifted(pooled, octaves[site.name]).round().long()
        for site in layer
    }


def _shifted(counts: Tensor, octaves: float) -> Tensor:
    """Return the histogram of the values times 2**octaves, rounded to a bin."""
    bins = (torch.arange(BINS) + round(octaves * OCTAVE)).clamp(0, BINS - 1)
    return torch.zeros_like(counts).index_add_(0, bins, counts)
