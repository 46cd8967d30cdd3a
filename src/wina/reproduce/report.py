"""What a grid says: a CSV of everything, a Markdown table, and plots."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wina.errors import UsageError
from wina.files import replacing, write_text
from wina.reproduce.grid import Cell, perplexity, short_name

REFERENCE = "teal"


def write_report(
    output: Path, cells: Sequence[Cell], reference: str = REFERENCE, *, plots: bool = True
) -> list[Path]:
    """Write results.csv, table.md and the plots; return their paths.

    Args:
        output: the grid's folder.
        cells: of the grid.
        reference: the method that others are paired with.
        plots: draw them; needs matplotlib.
    """
    paths = [output / "results.csv", output / "table.md"]
    write_text(paths[0], _csv(cells, reference))
    write_text(paths[1], table(cells, reference))
    if plots:
        paths += _plots(output, cells)
    return paths


def check_plots() -> None:
    """Raise UsageError if plots cannot be made here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib: pip install 'wina[report]', or pass --no-plots")


def paired(cell: Cell, reference: Cell) -> tuple[float, float]:
    """Return the mean difference of the negative log likelihood and its standard error.

    In nats a token, over the windows that both were scored on, each weighed alike; negative is
    better than the reference. One window has no standard error: NaN.

    Args:
        cell: a result.
        reference: another of the same model and sparsity.
    """
    zipped = zip(cell.nll, reference.nll, cell.positions, strict=True)
    differences = [(mine - other) / count for mine, other, count in zipped]
    number = len(differences)
    mean = sum(differences) / number
    if number < 2:
        return mean, math.nan
    variance = sum((x - mean) ** 2 for x in differences) / (number - 1)
    return mean, math.sqrt(variance / number)


def _partner(cell: Cell, cells: Sequence[Cell], reference: str) -> Cell | None:
    found = [
        x
        for x in cells
        if (x.model, x.method, x.target) == (cell.model, reference, cell.target)
        and x.status == "done"
    ]
    return found[0] if found and cell.status == "done" and cell.method != reference else None


def _row(cell: Cell, cells: Sequence[Cell], reference: str) -> dict[str, Any]:
    row: dict[str, Any] = cell.model_dump(exclude={"nll", "dense_nll", "positions", "versions"})
    row |= {name: None for name in ("perplexity", "dense_perplexity", "difference", "error")}
    row["reference"] = reference
    row["windows"], row["scored_positions"] = len(cell.positions), sum(cell.positions)
    if cell.status == "done":
        row["perplexity"] = perplexity(cell.nll, cell.positions)
        row["dense_perplexity"] = perplexity(cell.dense_nll, cell.positions)
    partner = _partner(cell, cells, reference)
    if partner is not None:
        row["difference"], row["error"] = paired(cell, partner)
    return row | cell.versions


def _csv(cells: Sequence[Cell], reference: str) -> str:
    rows = [_row(cell, cells, reference) for cell in cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(cells: Sequence[Cell], reference: str = REFERENCE) -> str:
    """Return Markdown: for each model the perplexities, paired differences, and true bytes."""
    parts = []
    for model in dict.fromkeys(cell.model for cell in cells):
        mine = [cell for cell in cells if cell.model == model]
        done = [cell for cell in mine if cell.status == "done"]
        parts.append(f"## {short_name(model)}\n")
        if done:
            first = done[0]
            parts.append(
                f"Dense perplexity {perplexity(first.dense_nll, first.positions):.2f}; "
                f"{sum(first.positions)} positions in {len(first.positions)} windows, "
                f"{first.dtype} on {first.device}, seed {first.seed}.\n"
            )
        parts.append("Perplexity (realized sparsity of the gates):\n")
        parts.append(_grid(mine, lambda x: f"{_ppl(x)} ({x.sparsity:.3f})"))

        def difference(cell: Cell, mine: Sequence[Cell] = mine) -> str:
            partner = _partner(cell, mine, reference)
            return "" if partner is None else "{:+.4f} ± {:.4f}".format(*paired(cell, partner))

        parts.append(
            f"Negative log likelihood less that of {reference} at the same target, nats a token, "
            "and its paired standard error over windows:\n"
        )
        parts.append(_grid(mine, difference))
        parts.append("True bytes a token, of the dense model's (everything a method adds paid):\n")
        parts.append(_grid(mine, lambda x: f"{x.bytes / x.dense_bytes:.3f}"))
        if refused := [cell for cell in mine if cell.status == "refused"]:
            reasons = dict.fromkeys(f"- {cell.method}: {cell.reason}" for cell in refused)
            parts.append("Refused:\n\n" + "\n".join(reasons) + "\n")
    departures = dict.fromkeys(
        f"- {cell.method} ({cell.paper}){': ' if cell.departures else ''}{cell.departures}"
        for cell in cells
    )
    parts.append("Methods and their departures:\n\n" + "\n".join(departures) + "\n")
    return "\n".join(parts)


def _ppl(cell: Cell) -> str:
    return f"{perplexity(cell.nll, cell.positions):.4g}"


def _grid(cells: Sequence[Cell], show: Callable[[Cell], str]) -> str:
    targets = sorted({cell.target for cell in cells})
    lines = [
        "| method | " + " | ".join(f"{target:.0%}" for target in targets) + " |",
        "| --- |" + " --- |" * len(targets),
    ]
    for method in dict.fromkeys(cell.method for cell in cells):
        row = []
        for target in targets:
            found = [x for x in cells if (x.method, x.target) == (method, target)]
            row.append(show(found[0]) if found and found[0].status == "done" else "—")
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _plots(output: Path, cells: Sequence[Cell]) -> list[Path]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "wina"  # the same cells give the same file
    from matplotlib import pyplot

    axes_of: dict[str, tuple[str, Callable[[Cell], float]]] = {
        "sparsity": ("realized sparsity of the gates", lambda cell: cell.sparsity),
        "bytes": ("true MB of weights a token", lambda cell: cell.bytes / 1e6),
    }
    paths = []
    for model in dict.fromkeys(cell.model for cell in cells):
        mine = [cell for cell in cells if cell.model == model and cell.status == "done"]
        if not mine:
            continue
        dense = perplexity(mine[0].dense_nll, mine[0].positions)
        for name, (label, value) in axes_of.items():
            figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
            for number, method in enumerate(dict.fromkeys(cell.method for cell in mine)):
                points = sorted(
                    (value(x), perplexity(x.nll, x.positions)) for x in mine if x.method == method
                )
                marker = "osD^v<>Pph*X"[number % 12]
                axes.plot(*zip(*points, strict=True), marker=marker, label=method)
            axes.axhline(dense, color="grey", linestyle=":", label="dense")
            axes.set(xlabel=label, ylabel="perplexity", yscale="log", title=short_name(model))
            axes.set_ylim(dense * 0.97, dense * 12)  # random leaves the picture
            axes.legend(fontsize="small")
            path = output / f"{short_name(model)}-{name}.svg"
            with replacing(path) as temporary:
                figure.savefig(temporary, format="svg", metadata={"Date": None})
            pyplot.close(figure)
            paths.append(path)
    return paths
