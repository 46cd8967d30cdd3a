"""`wina plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from wina.calibration import Calibration, make_plan
from wina.cli import options
from wina.errors import UsageError
from wina.evaluation.recommend import Loss
from wina.files import check_replaceable
from wina.methods import Setting, methods
from wina.models import identify
from wina.plan.plan import DOCUMENT
from wina.progress import note
from wina.tuning import TUNED, tuned_plan


def plan(
    calibration: Annotated[Path, typer.Argument(help="A folder made by wina calibrate.")],
    sparsity: options.Sparsity = 0.5,
    method: options.Method = None,
    allocation: options.Allocation = None,
    selection: options.Selection = "threshold",
    include_head: options.IncludeHead = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("plan"),
    model: Annotated[
        str | None, typer.Option(help="The model, for --refine, greedy and tuned.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A published method as a whole (wina-paper, teal-transform, larosa, ...), in "
            "place of method, allocation and selection; needs --model."
        ),
    ] = None,
    max_increase: options.MaxIncrease = None,
    max_kl: options.MaxKl = None,
    limit_text: options.LimitText = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Meet the target on held-out text; needs --model.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Make a plan for a target sparsity from a calibration; in seconds, without the model.

    Examples:
        wina plan calibration --sparsity 0.5 -o plan

        wina plan calibration --sparsity 0.65 --refine --model demo -o plan

        wina plan calibration --preset wina-paper --model demo -o plan

        wina plan calibration --max-perplexity-increase 2% --model demo -o plan

        wina plan calibration --max-kl 0.1 --limit-text code.txt --limit-text chats.txt --model demo
    """
    allowed = options.limits(max_increase, max_kl, limit_text)
    if allowed is not None and (preset is not None or refine or method == TUNED):
        raise UsageError("a limit finds a plan of a criterion: leave --preset and --refine out")
    if preset is not None:
        methods.get(preset)
        if method is not None or allocation is not None or selection != "threshold" or include_head:
            raise UsageError(
                "--preset is a whole method: give no --method, --allocation, --selection or "
                "--include-head with it"
            )
    options.check_request(sparsity, method, allocation, selection)
    if model is None and (
        refine or allocation == "greedy" or method == TUNED or preset or allowed is not None
    ):
        what = (
            "a limit"
            if allowed is not None
            else "--preset"
            if preset
            else "--refine"
            if refine
            else "--method tuned"
            if method == TUNED
            else "--allocation greedy"
        )
        raise UsageError(f"{what} needs the model itself: add --model MODEL")
    check_replaceable(output, DOCUMENT)
    found = Calibration.load(calibration)
    method = method or options.default_criterion(found)
    losses: dict[str, Loss] = {}
    loaded = None
    if model is not None:
        loaded = options.load(model, dtype, device, revision, trust_remote_code, quantize)
        found.document.model.check(identify(loaded.model, loaded.name))
    if preset is not None:
        assert loaded is not None
        made = methods.get(preset).plan(Setting(loaded.model, found), sparsity)
    elif allowed is not None:
        assert loaded is not None
        recommendation = options.recommended(
            loaded, found, allowed, method, allocation, selection, include_head, limit_text
        )
        made, losses = recommendation.plan, recommendation.losses
    elif method == TUNED:
        assert loaded is not None
        made = tuned_plan(
            found,
            loaded.model,
            sparsity,
            allocation=allocation,
            include_head=include_head,
            output=output,
        )
    else:
        made = make_plan(
            found,
            sparsity,
            method,
            allocation,
            selection,
            include_head=include_head,
            model=None if loaded is None else loaded.model,
            refine=refine,
        )
    made.save(output)
    document = made.document
    if as_json:
        content = document.model_dump(mode="json", exclude={"linears"})
        if losses:
            content["losses"] = {name: asdict(loss) for name, loss in losses.items()}
        options.print_json({"plan": str(output), "expected_sparsity": made.sparsity, **content})
        return
    realized = document.realized_sparsity
    held_out = "" if realized is None else f", {realized:.1%} on held-out text"
    note(
        f"{document.method}, {document.allocation}, {document.selection}: "
        f"{made.sparsity:.1%} expected{held_out} -> {output}",
        style="none",
    )
