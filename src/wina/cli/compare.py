"""`wina compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wina.cli import options
from wina.report import Comparison, compare_runs, read_run


def compare(
    first: Annotated[Path, typer.Argument(help="JSON of wina report, or of wina eval --json.")],
    second: Annotated[Path, typer.Argument(help="The other one.")],
    as_json: options.Json = False,
) -> None:
    """Compare two runs: settings that differ, and how far their results are apart.

    Plans that agree in method, allocation, selection and target are set side by side. Where both
    runs scored the same text or the same questions, differences are paired and have a standard
    error.

    Examples:
        wina compare before.json after.json

        wina compare before.json after.json --json
    """
    found = compare_runs(read_run(first), read_run(second))
    if as_json:
        options.print_json(found.model_dump(mode="json"))
    else:
        _show(found)


def _show(found: Comparison) -> None:
    console = Console()
    for name, source in (("first", found.first), ("second", found.second)):
        console.print(f"{name}: {escape(source)}", highlight=False, soft_wrap=True)
    if found.settings:
        table = Table("set otherwise", "first", "second")
        for name, pair in found.settings.items():
            table.add_row(name, *map(escape, pair))
        console.print(table)
    table = Table("plan", "", "first", "second", "difference")
    for plan in found.plans:
        for number, change in enumerate(plan.changes):
            difference = "" if change.difference is None else _number(change.difference, True)
            if change.stderr is not None:
                difference += f" ± {_number(change.stderr)}"
            table.add_row(
                plan.plan if number == 0 else "",
                change.name,
                _number(change.first),
                _number(change.second),
                difference,
                end_section=number == len(plan.changes) - 1,
            )
    console.print(table)
    console.print(
        "[dim]difference: second minus first; ± is its standard error, windows or questions "
        "paired, where both runs scored the same[/dim]",
        highlight=False,
    )


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "—"
    plus = "+" if sign else ""
    if abs(value) >= 10_000:
        return f"{value:{plus},.0f}"
    return f"{value:{plus}.4g}" if abs(value) >= 100 else f"{value:{plus}.4f}"
