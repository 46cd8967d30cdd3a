"""`wina inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wina.calibration import Calibration
from wina.calibration.artifact import DOCUMENT
from wina.cli import options
from wina.plan import Plan, PlannedLinear


def inspect(
    artifact: Annotated[str, typer.Argument(help="Folder of a plan or calibration, or hub id.")],
    as_json: options.Json = False,
) -> None:
    """Show what is in a plan or a calibration.

    Examples:
        wina inspect plan

        wina inspect calibration --json
    """
    if (Path(artifact) / DOCUMENT).exists():
        _show_calibration(Calibration.load(artifact), as_json)
    else:
        _show_plan(Plan.load(artifact), as_json)


def _show_plan(plan: Plan, as_json: bool) -> None:
    document = plan.document
    if as_json:
        options.print_json({"sparsity": plan.sparsity, **document.model_dump(mode="json")})
        return
    kinds = list(dict.fromkeys(linear.kind for linear in document.linears.values()))
    rows: dict[str, dict[str, list[PlannedLinear]]] = {}
    for linear in document.linears.values():
        row = "head" if linear.block is None else str(linear.block)
        rows.setdefault(row, {}).setdefault(linear.kind, []).append(linear)
    table = Table("block", *kinds, title="expected sparsity")
    for row, cells in rows.items():
        table.add_row(row, *(_mean(cells[kind]) if kind in cells else "" for kind in kinds))
    settings = document.model_dump(mode="json", exclude={"linears", "model"})
    if any(linear.usage < 1 for linear in document.linears.values()):
        settings["experts"] = _usage([linear.usage for linear in document.linears.values()])
    _print(table, {"base model": document.model.name, **settings, "expected": plan.sparsity})


def _show_calibration(calibration: Calibration, as_json: bool) -> None:
    document = calibration.document
    if as_json:
        options.print_json(document.model_dump(mode="json"))
        return
    table = Table("linear", "in", "out", "rms of x", "rms of dL/dx", title="statistics")
    for linear in calibration.statistics:
        site, rms = linear.site, linear.gradient_rms
        table.add_row(
            site.name,
            str(site.in_features),
            str(site.out_features),
            f"{float(linear.mean_square.mean().sqrt()):.3g}",
            "" if rms is None else f"{float(rms.square().mean().sqrt()):.3g}",
        )
    settings = document.model_dump(mode="json", exclude={"linears", "model"})
    if routed := [x.usage for x in calibration.statistics if x.site.expert is not None]:
        settings["experts"] = _usage(routed)
    _print(table, {"base model": document.model.name, **settings})


def _mean(linears: Sequence[PlannedLinear]) -> str:
    """Return the sparsity of a block's linears of one kind, those of all experts together."""
    cost = sum(linear.cost for linear in linears)
    saved = sum(linear.cost * linear.sparsity for linear in linears)
    return f"{saved / cost:.2f}" if cost else ""


def _usage(shares: Sequence[float]) -> str:
    """Say how unevenly tokens are routed."""
    routed = [share for share in shares if share < 1]
    return f"each sees {min(routed):.1%} to {max(routed):.1%} of the tokens"


def _print(table: Table, settings: dict[str, object]) -> None:
    console = Console()
    console.print(table)
    for name, value in settings.items():
        console.print(f"[dim]{name}:[/dim] {escape(str(value))}", highlight=False)
