"""The report's figures as SVG, which takes its colours from the page.

Matplotlib draws in colours that mean roles; in the SVG they become the page's variables, so that
one figure serves light and dark.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from wina.bench.operators import OperatorTiming, Roofline
from wina.errors import UsageError
from wina.evaluation import Evaluation
from wina.report.document import ScoreHistograms

# Roles: what matplotlib is told, and the page's variable. Any colours that nothing else uses do.
INK, MUTED, GRID, PAPER, ACCENT, KEPT, MARK = (f"#0a0b{n:02x}" for n in range(1, 8))
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    ACCENT: "accent",
    KEPT: "kept",
    MARK: "mark",
}
SERIES = tuple(f"#0a0c{n:02x}" for n in range(1, 9))
VARIABLES |= {colour: f"series-{number}" for number, colour in enumerate(SERIES, 1)}
MARKERS = "os^vP*Xd"
SHAPES = "●■▲▼✚★✖♦"  # the same, for legends
RIDGES = 7  # blocks whose histograms are drawn, evenly over the depth
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass
class Figure:
    """A figure of the page: its SVG, and what it says to those who cannot see it."""

    name: str
    svg: str
    summary: str


@dataclass(frozen=True)
class Point:
    """A plan in one picture: its place, and an upper bound or error of y."""

    plan: int
    x: float
    y: float
    error: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Series:
    """Plans of one method, in the order of sparsity."""

    name: str
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """What an axis shows, and which way is better."""

    label: str
    higher_is_better: bool
    logarithmic: bool = False
    unit: str = ""
    limits: tuple[float, float] | None = None  # beyond which nothing can lie


def check_plots() -> None:
    """Raise UsageError if figures cannot be made here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a report's figures need matplotlib: pip install 'wina[report]'")


def pareto(
    name: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    labels: Sequence[str],
    dense: tuple[float | None, float],
    recommended: int | None,
) -> Figure:
    """Draw one loss or quality against one price.

    Args:
        name: of the figure, for ids.
        x: what is paid or gained.
        y: the quality.
        series: the plans.
        labels: short ones, of all plans.
        dense: the dense model's x, if it has one, and y.
        recommended: number of the recommended plan.
    """
    with _drawing((3.3, 2.55)) as (figure, axes):
        from matplotlib import ticker

        points = [point for one in series for point in one.points]
        front = _front(points, x, y)
        axes.axhline(dense[1], color=MUTED, linewidth=0.9, linestyle=(0, (1.5, 2.5)), zorder=1)
        if dense[0] is not None:
            axes.plot(*dense, marker="D", markersize=5, color=MUTED, zorder=3, linestyle="none")
        for number, one in enumerate(series):
            _draw_series(axes, one, number, front, dense)
        mine = [point for point in points if point.plan == recommended]
        for point in mine:
            axes.plot(
                point.x, point.y, "o", markersize=13, zorder=2,
                markerfacecolor="none", markeredgecolor=MARK, markeredgewidth=1.8,
            )  # fmt: skip
        values = [dense[1], *(p.y for p in points), *(p.y + p.error[1] for p in points)]
        _scale(axes, y, values)
        across = [p.x for p in points] + ([] if dense[0] is None else [dense[0]])
        margin = 0.14 * (max(across) - min(across) or 1)
        axes.set_xlim(min(across) - margin, max(across) + margin)
        if not x.higher_is_better:
            axes.invert_xaxis()  # better is to the right in every picture
        named: dict[str, Point] = {}  # each name once, at the first series that has it
        for point in points:
            named.setdefault(labels[point.plan], point)
        _label_points(axes, list(named.values()), labels, y)
        axes.set_xlabel(x.label)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}{x.unit}"))
        svg = _svg(figure, name)
    said = "; ".join(f"{labels[p.plan]}: {p.y:.4g} at {p.x:.4g}{x.unit}" for p in points)
    return Figure(name, svg, f"{y.label} against {x.label}. Dense: {dense[1]:.4g}. {said}.")


def _draw_series(
    axes: Any, series: Series, number: int, front: set[int], dense: tuple[float | None, float]
) -> None:
    colour = SERIES[number % len(SERIES)]
    points = series.points
    start = [] if dense[0] is None else [(dense[0], dense[1])]
    path = [*start, *((p.x, p.y) for p in points)]
    axes.plot(*zip(*path, strict=True), color=colour, linewidth=1.5, zorder=2)
    for point in points:
        if point.error != (0.0, 0.0):
            low, high = point.y - point.error[0], point.y + point.error[1]
            axes.plot([point.x, point.x], [low, high], color=colour, linewidth=1.1, zorder=2)
        axes.plot(
            point.x, point.y,
            marker=MARKERS[number % len(MARKERS)],
            markersize=5.5, zorder=4, linestyle="none", color=colour, markeredgewidth=1.4,
            markeredgecolor=colour,
            markerfacecolor=colour if point.plan in front else PAPER,
        )  # fmt: skip


def _front(points: Sequence[Point], x: Axis, y: Axis) -> set[int]:
    """Return the plans that no other is better than in both ways."""

    def beats(one: Point, other: Point) -> bool:
        ways = ((one.x, other.x, x.higher_is_better), (one.y, other.y, y.higher_is_better))
        better = [(a - b) * (1 if higher else -1) for a, b, higher in ways]
        return min(better) >= 0 and max(better) > 0

    return {p.plan for p in points if not any(beats(other, p) for other in points)}


def _scale(axes: Any, y: Axis, values: Sequence[float]) -> None:
    from matplotlib import ticker

    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    if y.logarithmic and low > 0:
        axes.set_yscale("log")
        room = max((high / low) ** 0.1, 1.02)
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 6, 8)))
        if high / low > 8:
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        if high / low < 1.5:
            axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        room = 0.12 * (high - low or abs(high) or 1)
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        if y.limits is not None:
            least, most = y.limits
            ticks = ticker.MaxNLocator(5).tick_values(max(low - room, least), min(high, most))
            axes.set_yticks([x for x in ticks if least <= x <= most and x >= low - room])
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:.4g}{y.unit}"))


def _label_points(axes: Any, points: Sequence[Point], labels: Sequence[str], y: Axis) -> None:
    """Write names beside points, on the side where their line does not go on."""
    above = not y.higher_is_better
    first, last = axes.get_xlim()
    for point in points[:: 2 if len(points) > 6 else 1]:
        edge = (point.x - first) / (last - first) < 0.2  # where there is no room on the left
        axes.annotate(
            labels[point.plan],
            (point.x, point.y),
            xytext=(9 if edge else -7, 3 if above else -3),
            textcoords="offset points",
            ha="left" if edge else "right",
            va="bottom" if above else "top",
            fontsize=8,
            color=MUTED,
        )


def allocation(name: str, title: str, shares: dict[str, dict[int, float]]) -> Figure:
    """Draw a plan's realized sparsity, blocks down and projections across.

    Args:
        name: of the figure, for ids.
        title: of the plan.
        shares: by kind of projection and block.
    """
    kinds = list(shares)
    rows = sorted({block for by_block in shares.values() for block in by_block})
    with _drawing((2.3, 3.5)) as (figure, axes):
        axes.grid(False)
        from matplotlib.patches import Rectangle

        for column, kind in enumerate(kinds):
            for row, block in enumerate(rows):
                if block in shares[kind]:
                    axes.add_patch(
                        Rectangle(
                            (column + 0.03, row + 0.04),
                            0.94,
                            0.92,
                            linewidth=0,
                            facecolor=ACCENT,
                            alpha=0.04 + 0.96 * shares[kind][block],
                        )
                    )
        axes.set_xlim(0, len(kinds))
        axes.set_ylim(len(rows), 0)
        short = [kind.removesuffix("_proj") for kind in kinds]
        tilt = {} if max(map(len, short)) < 6 else {"rotation": 60, "ha": "right"}
        axes.set_xticks([i + 0.5 for i in range(len(kinds))], short, fontsize=8, **tilt)
        step = max(1, math.ceil(len(rows) / 10))
        places = range(0, len(rows), step)
        axes.set_yticks([i + 0.5 for i in places], [str(rows[i]) for i in places], fontsize=8)
        axes.set_title(title)
        axes.set_ylabel("block")
        for spine in axes.spines.values():
            spine.set_visible(False)
        svg = _svg(figure, name)
    each = [share for by_block in shares.values() for share in by_block.values()]
    summary = f"Realized sparsity, {title}: from {min(each):.0%} to {max(each):.0%} over linears."
    return Figure(name, svg, summary)


def allocation_scale(name: str) -> Figure:
    """Draw what the heat maps' shades mean."""
    with _drawing((2.3, 0.42)) as (figure, axes):
        axes.grid(False)
        steps = 24
        for step in range(steps):
            share = (step + 0.5) / steps
            axes.axvspan(
                step / steps, (step + 1) / steps, color=ACCENT, alpha=0.04 + 0.96 * share, lw=0
            )
        axes.set(xlim=(0, 1), ylim=(0, 1), yticks=[])
        axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"], fontsize=8)
        for spine in axes.spines.values():
            spine.set_visible(False)
        svg = _svg(figure, name)
    return Figure(name, svg, "Scale of the shades: no channel dropped to all dropped.")


def ridges(name: str, kind: str, scores: ScoreHistograms) -> Figure:
    """Draw histograms of score over threshold of one kind of projection, over the depth.

    Args:
        name: of the figure, for ids.
        kind: of projection.
        scores: all histograms.
    """
    mine = [x for x in scores.histograms if x.kind == kind]
    count = min(RIDGES, len(mine))
    chosen = [mine[round(i * (len(mine) - 1) / max(1, count - 1))] for i in range(count)]
    middles = [math.sqrt(a * b) for a, b in pairwise(scores.edges)]
    below = sum(x < 1 for x in middles)
    peak = max((max(x.shares[1:-1]) for x in chosen), default=1.0) or 1.0
    with _drawing((2.2, 2.5)) as (figure, axes):
        axes.grid(False)
        tall = 1.55  # of a ridge; the next one begins at 1
        for row, one in enumerate(chosen):
            base = len(chosen) - 1 - row
            heights = [base + tall * min(share, peak) / peak for share in one.shares]
            cut = (heights[below - 1] + heights[below]) / 2  # at the threshold itself
            left = [*middles[:below], 1.0], [*heights[:below], cut]
            right = [1.0, *middles[below:]], [cut, *heights[below:]]
            zorder = 2 + row
            for (x, y), colour, alpha in ((left, ACCENT, 0.75), (right, KEPT, 0.5)):
                axes.fill_between(x, base, y, color=PAPER, lw=0, zorder=zorder)
                axes.fill_between(x, base, y, color=colour, alpha=alpha, lw=0, zorder=zorder)
            axes.plot(middles, heights, color=INK, linewidth=0.7, zorder=zorder + 0.1)
            for other, place in one.others.items():
                colour = MARK if other > scores.plan else MUTED
                axes.plot(
                    [place, place], [base, base + 0.38], color=colour, linewidth=1.1,
                    zorder=zorder + 0.2, solid_capstyle="round",
                )  # fmt: skip
            share = f"{100 * one.dropped:.0f} %"
            axes.text(
                1.03, base, share, fontsize=7.5, ha="left", va="center", color=MUTED,
                transform=axes.get_yaxis_transform(), zorder=40,
            )  # fmt: skip
        axes.axvline(1, color=INK, linewidth=1, zorder=30)
        axes.set_xscale("log", base=2)
        axes.set_xlim(2.0**-6, 2.0**5)
        axes.set_xticks([2.0**-4, 0.25, 1, 4, 16], ["1/16", "1/4", "1", "4", "16"], fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(-0.05, len(chosen) + tall - 0.9)
        axes.set_yticks(range(count), [str(x.block) for x in reversed(chosen)], fontsize=8)
        axes.set_title(kind)
        axes.set_xlabel("score / threshold", fontsize=8)
        axes.spines["left"].set_visible(False)
        svg = _svg(figure, name)
    said = ", ".join(f"block {x.block} {x.dropped:.0%}" for x in chosen)
    return Figure(name, svg, f"Scores of {kind} over their threshold; dropped: {said}.")


def rooflines(name: str, found: Roofline, labels: Sequence[str]) -> Figure:
    """Draw each operator's time against the bytes it reads, and the least time they need.

    Args:
        name: of the figure, for ids.
        found: the timings.
        labels: short ones, of all plans.
    """
    operators = found.operators
    kinds = list(dict.fromkeys(x.kind for x in operators))
    plans = list(dict.fromkeys(x.plan for x in operators if x.plan is not None))
    with _drawing((4.7, 3.7)) as (figure, axes):
        from matplotlib import ticker

        megabytes = [x.bytes / 1e6 for x in operators]
        low, high = min(megabytes) / 1.5, max(megabytes) * 1.5
        roof = [mb * 1e3 / found.read_bandwidth_gbps for mb in (low, high)]
        bottom = roof[0] / 1.6
        axes.fill_between([low, high], bottom, roof, color=GRID, alpha=0.55, lw=0, zorder=1)
        axes.plot([low, high], roof, color=INK, linewidth=1.3, zorder=2)
        for kind in kinds:
            mine = [x for x in operators if x.kind == kind]
            line = [(x.bytes / 1e6, x.microseconds) for x in mine]
            axes.plot(*zip(*line, strict=True), color=GRID, linewidth=1, zorder=2)
        for x in operators:
            sparse = x.plan is not None
            colour = SERIES[plans.index(x.plan) % len(SERIES)] if x.plan is not None else INK
            axes.plot(
                x.bytes / 1e6, x.microseconds, linestyle="none",
                marker=MARKERS[kinds.index(x.kind) % len(MARKERS)], markersize=6, zorder=4,
                markerfacecolor=colour if sparse else PAPER, markeredgecolor=colour,
                markeredgewidth=1.2,
            )  # fmt: skip
        dense = [x for x in operators if x.plan is None]
        for size in dict.fromkeys(x.bytes for x in dense):  # of one size lie close together
            alike = [x for x in dense if x.bytes == size]
            axes.annotate(
                ", ".join(x.kind.removesuffix("_proj") for x in alike),
                (size / 1e6, max(x.microseconds for x in alike)),
                xytext=(0, 7), textcoords="offset points", fontsize=8, color=MUTED,
                ha="right" if size == max(x.bytes for x in dense) else "center",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(low, high * 1.15))
        axes.set_ylim(bottom, max(max(x.microseconds for x in operators), roof[1]) * 1.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("megabytes that a call touches")
        axes.set_ylabel("microseconds a call")
        svg = _svg(figure, name)
    said = "; ".join(_said(x, labels) for x in operators)
    return Figure(name, svg, f"Time of each operator against the bytes it touches. {said}.")


def _said(x: OperatorTiming, labels: Sequence[str]) -> str:
    which = "dense" if x.plan is None else labels[x.plan]
    return f"{x.kind} {which}: {x.microseconds:.1f} µs, {x.bytes / 1e6:.2f} MB"


def series_of(quality: Evaluation, points: Sequence[Point]) -> list[Series]:
    """Group points of plans by method and allocation, each from dense on."""
    found: dict[str, list[Point]] = {}
    for point in points:
        row = quality.results[point.plan]
        key = row.method if row.allocation == row.method else f"{row.method}, {row.allocation}"
        found.setdefault(key, []).append(point)
    return [Series(name, each) for name, each in found.items()]


@contextmanager
def _drawing(size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes, in the report's style; ``size`` in inches."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


def _svg(figure: Any, name: str) -> str:
    """Return the figure as an element for the page, with ids of its own."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\b(id="|xlink:href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # The page says how wide it is; the view box keeps the shape.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
