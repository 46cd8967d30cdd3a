"""What `wina.sparsify` costs at start-up: time, and memory beyond the weights.

    python benchmarks/startup.py --config llama-3-8b --device meta
    python benchmarks/startup.py --config llama-3.2-1b
    python benchmarks/startup.py --config llama-3-8b --blocks 8

Weights are random, thresholds too. Each step's peak is the most memory that the process held
during it, beyond what it held before (Linux alone counts that).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer

from wina import layers
from wina.bench.configs import CONFIGS, random_model
from wina.models import find_sites, identify
from wina.plan import ModelIdentity, Plan, PlanDocument, PlannedLinear

MEMORY = Path("/proc/self/status")


def main(
    config: str = "llama-3.2-1b", device: str = "cpu", dtype: str = "bfloat16", blocks: int = 0
) -> None:
    """Build the model, apply a plan, lay weights out for decoding; print one JSON object.

    With --blocks the model has only its first blocks, where memory is short.
    """
    if blocks:
        cut = copy.deepcopy(CONFIGS.get(config))
        cut.num_hidden_layers = blocks
        config = f"{config}, {blocks} of {CONFIGS.get(config).num_hidden_layers} blocks"
        CONFIGS.add(config, cut)
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
    steps: dict[str, Callable[[], object]] = {"sparsify": lambda: layers.sparsify(model, plan)}
    if device != "meta":
        # What wina.sparsify does first: does the plan belong to these weights?
        steps = {"identify": lambda: identify(model, config), **steps}
        steps["lay out"] = lambda: layers.lay_out_for_decode(model)
        steps["densify"] = lambda: layers.densify(model)
    measured = {name: measure(step) for name, step in steps.items()}
    print(
        json.dumps(
            {
                "config": config,
                "device": device,
                "weights_gib": weights / 2**30,
                "linears": len(sites),
                "largest_linear_gib": max(s.weights for s in sites) * 2 / 2**30,
                "build_seconds": built,
                "steps": measured,
            },
            indent=1,
        )
    )


def measure(step: Callable[[], object]) -> dict[str, float | None]:
    """Return a step's seconds, and the memory it held at its peak beyond that before it, GiB."""
    before = None
    if MEMORY.exists():
        (MEMORY.parent / "clear_refs").write_text("5")  # the peak starts anew
        before = _gib("VmRSS")
    begin = time.perf_counter()
    step()
    seconds = time.perf_counter() - begin
    peak = None if before is None else max(0.0, _gib("VmHWM") - before)
    return {"seconds": seconds, "peak_gib": peak}


def _gib(name: str) -> float:
    line = next(x for x in MEMORY.read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    typer.run(main)
