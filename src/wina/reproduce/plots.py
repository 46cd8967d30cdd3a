"""Plots of a grid: perplexity against sparsity, and against true bytes a token."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wina.errors import UsageError
from wina.files import replacing
from wina.reproduce.grid import Cell, perplexity, short_name

# Okabe and Ito's colours, which colour-blind readers can tell apart, and a few greys and browns.
COLOURS = (
    "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4ba0", "#8c6d31",
    "#4d4d4d", "#999999", "#b2182b", "#01665e",
)  # fmt: skip
MARKERS = "osD^v<>Pph*X"
HIGHEST = 8.0  # times the dense perplexity; what is worse leaves the picture


def check_plots() -> None:
    """Raise UsageError if plots cannot be made here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib: pip install 'wina[report]', or pass --no-plots")


def draw(output: Path, cells: Sequence[Cell]) -> list[Path]:
    """Write two SVG files a model into the grid's folder and return their paths."""
    axes_of: dict[str, tuple[str, Callable[[Cell], float]]] = {
        "sparsity": ("sparsity of the gates, %", lambda cell: 100 * cell.sparsity),
        "bytes": ("bytes read a token, % of the dense model's", _share_of_bytes),
    }
    names = list(dict.fromkeys(cell.method for cell in cells))
    paths = []
    for model in dict.fromkeys(cell.model for cell in cells):
        mine = [cell for cell in cells if cell.model == model and cell.status == "done"]
        for name, (label, value) in axes_of.items() if mine else ():
            path = output / f"{short_name(model)}-{name}.svg"
            _figure(path, mine, names, label, value)
            paths.append(path)
    return paths


def _share_of_bytes(cell: Cell) -> float:
    return 100 * cell.bytes / cell.dense_bytes


def _figure(
    path: Path, cells: Sequence[Cell], names: Sequence[str], label: str, value: Any
) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    style = {
        "svg.hashsalt": "wina",  # the same cells give the same file
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#666666",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
    }
    dense = perplexity(cells[0].dense_nll, cells[0].positions)
    top = dense * HIGHEST
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
        figure.patch.set_facecolor("white")
        beyond = []
        for number, name in enumerate(names):
            points = _points([cell for cell in cells if cell.method == name], value)
            if not points:
                continue
            if min(y for _, y in points) > top:
                beyond.append(name)
                continue
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                linewidth=1.6,
                label=name,
                clip_on=True,
            )
        axes.axhline(dense, color="#666666", linewidth=1, linestyle=(0, (1, 2)), label="dense")
        axes.set(yscale="log", xlabel=label, ylabel="perplexity", ylim=(dense * 0.96, top))
        axes.set_title(short_name(cells[0].model), loc="left", fontsize=11)
        axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        if beyond:
            text = f"beyond the picture: {', '.join(beyond)}"
            figure.supxlabel(text, x=0.99, ha="right", fontsize=8, color="#666666")
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            fontsize=9,
            labelspacing=0.7,
        )
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _points(cells: Sequence[Cell], value: Callable[[Cell], float]) -> list[tuple[float, float]]:
    """Return (value, perplexity) of each target, means over seeds, by rising value."""
    points = []
    for target in {cell.target for cell in cells}:
        found = [cell for cell in cells if cell.target == target]
        mean = sum(map(value, found)) / len(found)
        points.append((mean, sum(perplexity(x.nll, x.positions) for x in found) / len(found)))
    return sorted(points)
