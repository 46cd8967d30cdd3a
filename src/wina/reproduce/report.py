"""What a grid says: a CSV of everything, and a Markdown table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wina.files import write_text
from wina.reproduce.grid import Cell, perplexity, short_name
from wina.reproduce.plots import draw

REFERENCES = ("teal", "teal-transform")


def write_report(
    output: Path,
    cells: Sequence[Cell],
    references: Sequence[str] = REFERENCES,
    *,
    plots: bool = True,
) -> list[Path]:
    """Write results.csv, table.md and the plots; return their paths.

    Args:
        output: the grid's folder.
        cells: of the grid.
        references: methods that the others are paired with.
        plots: draw them; needs matplotlib.
    """
    paths = [output / "results.csv", output / "table.md"]
    write_text(paths[0], _csv(cells, references))
    write_text(paths[1], table(cells, references))
    if plots:
        paths += draw(output, cells)
    return paths


@dataclass(frozen=True)
class Entry:
    """A method at a sparsity on a model: its cells of all seeds, at least one, all done."""

    cells: Sequence[Cell]

    @property
    def nll(self) -> list[float]:
        """Negative log likelihood of each window, nats a token, mean over seeds."""
        positions = self.cells[0].positions
        sums = zip(*(cell.nll for cell in self.cells), strict=True)
        zipped = zip(sums, positions, strict=True)
        return [sum(values) / len(self.cells) / count for values, count in zipped]

    def mean(self, what: Callable[[Cell], float]) -> float:
        """Return the mean of a number over seeds."""
        return sum(map(what, self.cells)) / len(self.cells)

    def spread(self, what: Callable[[Cell], float]) -> float:
        """Return the standard deviation of a number over seeds; NaN for one seed."""
        mean, number = self.mean(what), len(self.cells)
        if number < 2:
            return math.nan
        return math.sqrt(sum((what(x) - mean) ** 2 for x in self.cells) / (number - 1))


def paired(entry: Entry, reference: Entry) -> tuple[float, float]:
    """Return the mean difference of the negative log likelihood and its standard error.

    In nats a token, over the windows that both were scored on, each weighed alike; negative is
    better than the reference. One window has no standard error: NaN.

    Args:
        entry: a result.
        reference: another of the same model and sparsity.
    """
    differences = [mine - other for mine, other in zip(entry.nll, reference.nll, strict=True)]
    number = len(differences)
    mean = sum(differences) / number
    if number < 2:
        return mean, math.nan
    variance = sum((x - mean) ** 2 for x in differences) / (number - 1)
    return mean, math.sqrt(variance / number)


def _entry(cells: Sequence[Cell], model: str, method: str, target: float) -> Entry | None:
    found = [
        x
        for x in cells
        if (x.model, x.method, x.target) == (model, method, target) and x.status == "done"
    ]
    return Entry(found) if found else None


def _ppl(cell: Cell) -> float:
    return perplexity(cell.nll, cell.positions)


def _row(cell: Cell, cells: Sequence[Cell], references: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = cell.model_dump(exclude={"nll", "dense_nll", "positions", "versions"})
    done = cell.status == "done"
    row["windows"], row["scored_positions"] = len(cell.positions), sum(cell.positions)
    row["perplexity"] = _ppl(cell) if done else None
    row["dense_perplexity"] = perplexity(cell.dense_nll, cell.positions) if done else None
    for name in references:
        other = _entry(cells, cell.model, name, cell.target)
        usable = done and other is not None and cell.method != name
        less = paired(Entry([cell]), other) if usable and other is not None else (None, None)
        row[f"nll_less_{name}"], row[f"nll_less_{name}_error"] = less
    return row | cell.versions


def _csv(cells: Sequence[Cell], references: Sequence[str]) -> str:
    rows = [_row(cell, cells, references) for cell in cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(cells: Sequence[Cell], references: Sequence[str] = REFERENCES) -> str:
    """Return Markdown: for each model the perplexities, paired differences, and true bytes."""
    parts = []
    for model in dict.fromkeys(cell.model for cell in cells):
        mine = [cell for cell in cells if cell.model == model]
        parts.append(f"## {short_name(model)}\n")
        parts += _about(mine)
        parts.append("Perplexity (realized sparsity of the gates):\n")
        parts.append(_grid(mine, _perplexity))
        for name in references:
            if any(cell.method == name for cell in mine):
                parts.append(
                    f"Negative log likelihood less that of {name} at the same target, nats a "
                    "token, and its paired standard error over windows:\n"
                )
                parts.append(_grid(mine, _difference(mine, name)))
        parts.append("KL to the dense model, nats a token (share of tokens where both agree):\n")
        parts.append(_grid(mine, _divergence))
        parts.append("True bytes a token, of the dense model's (everything a method adds paid):\n")
        parts.append(_grid(mine, lambda x: f"{x.mean(lambda c: c.bytes / c.dense_bytes):.3f}"))
        if refused := [cell for cell in mine if cell.status == "refused"]:
            reasons = dict.fromkeys(f"- {cell.method}: {cell.reason}" for cell in refused)
            parts.append("Refused:\n\n" + "\n".join(reasons) + "\n")
    departures = dict.fromkeys(
        f"- {cell.method} ({cell.paper}){': ' if cell.departures else ''}{cell.departures}"
        for cell in cells
    )
    parts.append("Methods and their departures:\n\n" + "\n".join(departures) + "\n")
    return "\n".join(parts)


def _about(cells: Sequence[Cell]) -> list[str]:
    done = [cell for cell in cells if cell.status == "done"]
    if not done:
        return []
    first, seeds = done[0], sorted({cell.seed for cell in done})
    text = (
        f"Dense perplexity {perplexity(first.dense_nll, first.positions):.2f}; "
        f"{sum(first.positions)} positions in {len(first.positions)} windows, "
        f"{first.dtype} on {first.device}, "
    )
    if len(seeds) == 1:
        return [text + f"seed {seeds[0]}.\n"]
    named = ", ".join(map(str, seeds))
    return [text + f"seeds {named} (± is the standard deviation over them).\n"]


def _perplexity(entry: Entry) -> str:
    spread = entry.spread(_ppl)
    suffix = "" if math.isnan(spread) else f" ± {spread:.2g}"
    return f"{entry.mean(_ppl):.4g}{suffix} ({entry.mean(lambda x: x.sparsity):.3f})"


def _divergence(entry: Entry) -> str:
    return f"{entry.mean(lambda x: x.kl):.3f} ({entry.mean(lambda x: x.agreement):.3f})"


def _difference(cells: Sequence[Cell], reference: str) -> Callable[[Entry], str]:
    def show(entry: Entry) -> str:
        cell = entry.cells[0]
        other = _entry(cells, cell.model, reference, cell.target)
        if other is None or cell.method == reference:
            return ""
        return "{:+.4f} ± {:.4f}".format(*paired(entry, other))

    return show


def _grid(cells: Sequence[Cell], show: Callable[[Entry], str]) -> str:
    targets = sorted({cell.target for cell in cells})
    lines = [
        "| method | " + " | ".join(f"{target:.0%}" for target in targets) + " |",
        "| --- |" + " --- |" * len(targets),
    ]
    for method in dict.fromkeys(cell.method for cell in cells):
        found = [_entry(cells, cells[0].model, method, target) for target in targets]
        if any(found):
            row = ["—" if entry is None else show(entry) for entry in found]
            lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"
