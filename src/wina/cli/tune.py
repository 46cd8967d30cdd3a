"""`wina tune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from wina.calibration import Calibration, make_plan
from wina.cli import options
from wina.criteria import criteria
from wina.files import check_replaceable
from wina.models import identify
from wina.plan import Plan
from wina.plan.plan import DOCUMENT
from wina.progress import console
from wina.selection import check_sparsity
from wina.tuning import default_settings
from wina.tuning import tune as run_tuning


def tune(
    model: options.Model = None,
    calibration: Annotated[Path, typer.Option(help="A folder made by wina calibrate.")] = Path(
        "calibration"
    ),
    sparsity: options.Sparsity = 0.5,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("plan"),
    start: Annotated[
        str | None, typer.Option(help="A plan to start from; made from the calibration if omitted.")
    ] = None,
    method: Annotated[str, typer.Option(help="Criterion of the start.")] = "loss",
    allocation: options.Allocation = None,
    include_head: options.IncludeHead = False,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps: 200, on a CPU 150 small ones.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows a step: 4, on a CPU 2.")] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a window: the calibration's, on a CPU at most 256."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Adam's learning rate for log thresholds.")] = 0.02,
    bias_rate: Annotated[
        float, typer.Option(help="The same for output biases; 0 leaves them out.")
    ] = 0.01,
    checkpointing: Annotated[
        bool | None,
        typer.Option(help="Recompute activations: less memory, more time. As needed if omitted."),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Tune a plan's thresholds against the dense model; weights stay as they are.

    Work is saved as it goes: started again after an interruption, it goes on.

    Examples:
        wina tune demo --calibration calibration --sparsity 0.5 -o tuned

        wina tune demo --calibration calibration --sparsity 0.65 --steps 400 -o tuned65
    """
    check_sparsity(sparsity)
    criteria.get(method)
    chosen = {"steps": steps, "batch": batch, "context": context}
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    replace(default_settings("cpu"), **given)  # refuses what is wrong before the model is loaded
    check_replaceable(output, DOCUMENT)
    found = Calibration.load(calibration)
    first = None if start is None else Plan.load(start)
    loaded = options.load(model, dtype, device, revision, trust_remote_code, quantize)
    found.document.model.check(identify(loaded.model, loaded.name))
    if first is None:
        first = make_plan(
            found, sparsity, method, allocation, include_head=include_head, model=loaded.model
        )
    settings = replace(
        default_settings(loaded.model.device.type),
        rate=rate,
        bias_rate=bias_rate,
        seed=seed,
        checkpointing=checkpointing,
        **given,
    )
    tuned = run_tuning(loaded.model, found, first, settings, output=output)
    tuned.save(output)
    document = tuned.document
    if as_json:
        content = document.model_dump(mode="json", exclude={"linears"})
        options.print_json({"plan": str(output), **content})
        return
    console.print(f"{document.realized_sparsity:.1%} on held-out text -> {output}")
