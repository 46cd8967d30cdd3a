"""What `wina.sparsify` costs at start-up: time, and memory beyond the weights.

    python benchmarks/startup.py --config llama-3-8b --device meta
    python benchmarks/startup.py --config llama-3.2-1b

Weights are random, thresholds too. On a CPU the peak is the process's own, before and after.
"""

from __future__ import annotations

import json
import resource
import time

import torch
import typer

from wina import layers
from wina.bench.configs import CONFIGS, random_model
from wina.models import find_sites
from wina.plan import ModelIdentity, Plan, PlanDocument, PlannedLinear


def main(config: str = "llama-3.2-1b", device: str = "cpu", dtype: str = "bfloat16") -> None:
    """Build the model, apply a plan, lay weights out for decoding; print one JSON object."""
    CONFIGS.get(config)
    begin = time.perf_counter()
    model = random_model(config, getattr(torch, dtype), torch.device(device))
    built = time.perf_counter() - begin
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    sites = find_sites(model)
    identity = ModelIdentity(name=config, config_hash="", weights_hash="", dtype=dtype)
    linears = {
        site.name: PlannedLinear(
            kind=site.kind,
            block=site.block,
            in_features=site.in_features,
            out_features=site.out_features,
            sparsity=0.5,
        )
        for site in sites
    }
    document = PlanDocument(
        model=identity,
        method="random",
        allocation="uniform",
        selection="threshold",
        target_sparsity=0.5,
        linears=linears,
    )
    plan = Plan(document, {site.name: torch.rand(site.in_features) for site in sites})
    peak = _peak()
    begin = time.perf_counter()
    layers.sparsify(model, plan)
    applied = time.perf_counter() - begin
    begin = time.perf_counter()
    if device != "meta":
        layers.lay_out_for_decode(model)
    laid_out = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "config": config,
                "device": device,
                "weights_gib": weights / 2**30,
                "linears": len(sites),
                "largest_linear_gib": max(s.weights for s in sites) * 2 / 2**30,
                "build_seconds": built,
                "sparsify_seconds": applied,
                "layout_seconds": laid_out,
                "peak_beyond_weights_gib": max(0.0, _peak() - peak),
            },
            indent=1,
        )
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    typer.run(main)
