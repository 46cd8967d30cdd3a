"""What calibration and tuning cost in time and memory, on random weights of a named shape.

    python benchmarks/tuning_cost.py --config llama-3-8b --steps 20 --device cuda

Text is random ids, so nothing is said of quality. Steps are all alike: the time of the default
number of them follows from those taken, and both are printed. Held-out checks after the first
(a few seconds each) are left out.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from typing import Annotated

import torch
import typer

from wina.bench.configs import IdsOnly, RandomText, random_model
from wina.calibration import CalibrationSettings, calibrate, make_plan
from wina.models.loading import DTYPES, resolve_device
from wina.tuning import default_settings, tune


def main(
    config: Annotated[str, typer.Option()] = "llama-3-8b",
    device: str = "auto",
    dtype: str = "bfloat16",
    steps: int = 20,
    few: int = 4,
    tokens: int = 65_536,
    statistics_tokens: int = 32_768,
    sparsity: float = 0.5,
) -> None:
    """Calibrate, plan and tune; print one JSON object."""
    place = resolve_device(device)
    model = random_model(config, DTYPES[dtype], place)
    settings = CalibrationSettings(tokens=tokens, statistics_tokens=statistics_tokens)
    seconds: dict[str, float] = {}
    begin = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal begin
        if place.type == "cuda":
            torch.cuda.synchronize()
        seconds[what], begin = time.perf_counter() - begin, time.perf_counter()
        print(f"{what}: {seconds[what]:.1f} s", file=sys.stderr, flush=True)

    source = RandomText(model.config.get_text_config().vocab_size)
    calibration = calibrate(model, IdsOnly(), source, settings, name=config)
    lap("calibration")
    plan = make_plan(calibration, sparsity, "loss", model=model)
    lap("plan")
    tuning = default_settings(place.type)
    # Two lengths, so that what is done once is told from what every step costs.
    for count in (few, few + steps):
        tune(model, calibration, plan, replace(tuning, steps=count, evaluations=1))
        lap(f"tuning of {count} steps")
    first, second = (seconds[f"tuning of {count} steps"] for count in (few, few + steps))
    each = (second - first) / steps
    whole = seconds["calibration"] + seconds["plan"] + first + (tuning.steps - few) * each
    cuda = place.type == "cuda"
    print(
        json.dumps(
            {
                "config": config,
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "torch": torch.__version__,
                "seconds": seconds,
                "tokens_a_step": tuning.batch * (tuning.context or settings.context),
                "seconds_a_step": each,
                "default_steps": tuning.steps,
                "seconds_in_all": whole,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30
                if cuda
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    typer.run(main)
