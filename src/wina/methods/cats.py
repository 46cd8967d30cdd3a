"""CATS: the gate of a gated MLP decides which rows of up and columns of down are read.

g = gate(x) is computed in full. Where |act(g_j)| is below the block's threshold, row j of up_proj
and column j of down_proj are skipped. Only these two of a block's linears become sparse, so that a
share p of them is needed for sparsity s over all linears: p = s x all weights / (up and down).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wina.allocation.build import versions
from wina.calibration.rotated import STATISTICS_TOKENS
from wina.errors import UsageError
from wina.kernels.reference import ACTIVATIONS
from wina.methods.base import Method, Setting, register
from wina.methods.recipe import search_ids
from wina.models import Site, run_body
from wina.plan import Extras, OutputGate, Plan, PlanDocument, PlannedLinear
from wina.statistics import BINS, cumulative, histogram, value_at

NAMES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"} | dict.fromkeys(
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"
)
MOST = 0.98
EXACT_ZERO = 1.2e-38  # as a threshold it drops what is exactly zero


def cats(setting: Setting, sparsity: float) -> Plan:
    """Return the plan; raise UsageError without gated MLPs, or if they weigh too little."""
    sites = [linear.site for linear in setting.calibration.linears(include_head=False)]
    gates = gated_mlps(sites)
    activation = NAMES.get(_activation_name(setting.model.config.get_text_config()))
    if not gates or activation is None:
        raise UsageError(
            "CATS needs gated MLPs of separate gate_proj, up_proj and down_proj, with one of the "
            f"activations {', '.join(sorted(NAMES))}"
        )
    by_name = {site.name: site for site in sites}
    pairs = [by_name[name] for gate in gates.values() for name in (gate["up"], gate["down"])]
    share = sparsity * sum(x.weights for x in sites) / sum(x.weights for x in pairs)
    if share > MOST:
        raise UsageError(
            f"CATS cannot reach {sparsity:.0%}: up_proj and down_proj, all that it skips, are "
            f"{sparsity / share:.0%} of the blocks' weights"
        )
    counts = setting.once(
        "cats", lambda: _histograms(setting, list(gates), ACTIVATIONS[activation])
    )

    linears, vectors, parts = {}, {}, {}
    skipped = {site.name: share for site in pairs}
    downs = {gate["down"] for gate in gates.values()}
    for site in sites:
        linears[site.name] = PlannedLinear(
            kind=site.kind,
            block=site.block,
            in_features=site.in_features,
            out_features=site.out_features,
            sparsity=skipped.get(site.name, 0.0),
        )
        floor = EXACT_ZERO if site.name in downs else 0.0
        vectors[site.name] = torch.full((site.in_features,), floor)
    for name in gates:
        threshold = value_at(cumulative(counts[name])[None], torch.tensor([share]))
        width = by_name[name].out_features
        parts[f"{name}.output_thresholds"] = threshold.repeat(width).float()
    record = setting.calibration.document
    extras = Extras(
        output_gates={
            name: OutputGate(activation=activation, up=gate["up"], down=gate["down"])
            for name, gate in gates.items()
        }
    )
    document = PlanDocument(
        schema_version=2,
        model=record.model,
        method="cats",
        allocation="uniform",
        selection="threshold",
        target_sparsity=sparsity,
        linears=linears,
        calibration={"source": record.source, "tokens": record.tokens},
        versions=versions(),
        extras=extras,
    )
    return Plan(document, vectors, {}, parts)


def gated_mlps(sites: list[Site]) -> dict[str, dict[str, str]]:
    """Return, by the gate projection's name, the names of up and down beside it."""
    names = {site.name for site in sites if site.expert is None}
    found = {}
    for site in sites:
        if site.kind == "gate_proj" and site.name in names:
            parent = site.name.removesuffix("gate_proj")
            others = {key: f"{parent}{key}_proj" for key in ("up", "down")}
            if names >= set(others.values()):
                found[site.name] = others
    return found


def _activation_name(config: Any) -> str:
    for name in ("hidden_activation", "hidden_act"):
        found = getattr(config, name, None)
        if found:
            return str(found)
    return ""


@torch.no_grad()
def _histograms(
    setting: Setting, names: list[str], activation: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the histogram of |act(gate(x))| of each block, shape (BINS,), int64, on the CPU."""
    skip = setting.calibration.document.dense_prefix
    counts = {name: torch.zeros(BINS, dtype=torch.int64) for name in names}

    def hook(name: str) -> Any:
        def see(_module: nn.Module, _args: Any, y: Tensor) -> None:
            counts[name] += histogram(activation(y[:, skip:]).abs().float()).cpu()

        return see

    handles = [
        setting.model.get_submodule(name).register_forward_hook(hook(name)) for name in names
    ]
    try:
        for ids in torch.split(search_ids(setting, STATISTICS_TOKENS), 1):
            run_body(setting.model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return counts


CATS = register(
    Method(
        name="cats",
        paper="CATS, arXiv 2404.08763",
        departures=(
            "the target is over all linears of the blocks, as for the others, so that the MLP's "
            "share is higher than the name would say in the paper; no fine-tuning"
        ),
        make=cats,
        adds="a gate on the outputs of gate_proj; no kernel here skips rows of up_proj",
    )
)
