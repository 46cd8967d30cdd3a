"""The page: one HTML file with everything in it, made from a report's numbers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from wina.evaluation.quality import SparseResult
from wina.evaluation.tasks import Metric, TasksEvaluation
from wina.report import plots
from wina.report.document import Report
from wina.report.plots import Axis, Figure, Point

FOLDER = Path(__file__).parent
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
PREFERRED = ("acc_norm", "acc", "exact_match")  # of a task's metrics, the one that is drawn


@dataclass(frozen=True)
class Measure:
    """A quality or price of a plan: its axis, the dense value, and a value for each plan."""

    axis: Axis
    dense: float | None
    values: Sequence[float | None]
    errors: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Row:
    """A row of figures: one quality against each price."""

    title: str
    note: str
    figures: list[Figure]


@dataclass(frozen=True)
class Tile:
    """A number for those who read no further."""

    label: str
    value: str
    detail: str


def render(report: Report) -> str:
    """Return the page, self-contained: no script, nothing fetched, light and dark."""
    plots.check_plots()
    template = _environment().get_template("page.html")
    page = template.render(
        report=report,
        css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        names=[plan.name for plan in report.plans],
        shown=shown(report),
        tiles=tiles(report),
        rows=quality_rows(report),
        legend=_legend(report),
        maps=_maps(report),
        ridges=_ridges(report),
        roofline=_roofline(report),
        table=table(report),
        tasks=_task_rows(report.tasks),
        operators=_operator_rows(report),
        gains=_operator_gains(report),
        use=f"wina run {report.source or report.model} {report.plans[shown(report)].use} --compare",
    )
    return page.replace(" %", "\N{NO-BREAK SPACE}%")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda figure: Markup(figure.svg)
    environment.filters["seen"] = seen
    return environment


def shown(report: Report) -> int:
    """Return the number of the plan that the page speaks of: the recommended, or the last."""
    chosen = report.recommendation
    return len(report.plans) - 1 if chosen.plan is None else chosen.plan


def percent(value: float, digits: int = 1, sign: bool = False) -> str:
    """Return a share as per cent, with a true minus sign."""
    return f"{100 * value:{'+' if sign else ''}.{digits}f} %".replace("-", MINUS)


def seen(token: str) -> tuple[str, str, str]:
    """Return a token's white space before it, what can be seen of it, and what follows."""
    bare = token.strip()
    if not bare:  # white space alone, or the end of the text
        return "", {"": "⏹", "\n": "⏎"}.get(token, "␣"), token
    before, _, after = token.partition(bare)
    return before, bare, after


def megabytes(size: float) -> str:
    """Return a number of bytes in megabytes, without the unit."""
    mega = size / 1e6
    return f"{mega:.1f}" if mega >= 10 else f"{mega:.3g}"


def _upper(value: float | None) -> str:
    return (
        "too few windows for a bound" if value is None else f"at most {percent(value, sign=True)}"
    )


def tiles(report: Report) -> list[Tile]:
    """Return what matters most of the plan that the page speaks of."""
    number = shown(report)
    row = report.quality.results[number]
    found = [
        Tile("weights not touched", percent(row.sparsity), "measured on the scored text"),
        Tile(
            "bytes a token",
            percent(row.bytes / row.dense_bytes - 1, sign=True),
            f"{megabytes(row.bytes)} MB instead of {megabytes(row.dense_bytes)}",
        ),
    ]
    best = dense_speed(report)
    if report.speed is not None and best:
        speed = report.speed.results[number].tokens_per_second
        detail = f"{speed:.1f} a second; the best dense {best:.1f}"
        found.append(Tile("decoding speed", f"{speed / best:.2f} {TIMES}", detail))
    found += [
        Tile("perplexity", percent(row.increase, sign=True), _upper(row.increase_upper)),
        Tile("same first token", percent(row.top1_agreement), f"KL {row.kl:.3f} nats a token"),
    ]
    for task, _, metric in _drawn_metrics(report.tasks, number):
        if metric.difference is not None and metric.difference_stderr is not None:
            points = f"{100 * metric.difference:+.1f}".replace("-", MINUS)
            error = 100 * metric.difference_stderr
            detail = (
                f"± {error:.1f} points, paired; dense {percent(metric.value - metric.difference)}"
            )
            found.append(Tile(f"{task} accuracy", f"{points} points", detail))
    return found


def dense_speed(report: Report) -> float | None:
    """Return tokens a second of the fastest dense way to decode at the same precision."""
    if report.speed is None:
        return None
    found = [
        x.tokens_per_second
        for x in report.speed.baselines
        if x.same_precision and x.tokens_per_second
    ]
    return max(found, default=None)


def _drawn_metrics(
    tasks: TasksEvaluation | None, plan: int | None
) -> list[tuple[str, str, Metric]]:
    """Return the metric of each task that is drawn, of a plan or of the dense model."""
    if tasks is None:
        return []
    one = tasks.dense if plan is None else tasks.results[plan]
    found = []
    for task, score in one.tasks.items():
        by_name = {name.partition(",")[0]: (name, metric) for name, metric in score.metrics.items()}
        name = next((x for x in PREFERRED if x in by_name), next(iter(by_name), None))
        if name is not None:
            found.append((task, *by_name[name]))
    return found


def _qualities(report: Report) -> list[tuple[str, str, Measure]]:
    """Return title, note and values of everything that a plan may lose."""
    quality = report.quality
    rows = quality.results
    dense = quality.dense.perplexity

    def up(values: Sequence[float | None], estimates: Sequence[float]) -> list[tuple[float, float]]:
        pairs = zip(values, estimates, strict=True)
        return [(0.0, 0.0 if high is None else max(0.0, high - x)) for high, x in pairs]

    bounds = [None if x.increase_upper is None else dense * (1 + x.increase_upper) for x in rows]
    perplexities = [x.perplexity for x in rows]
    kls = [x.kl for x in rows]
    found = [
        (
            "Perplexity",
            "Lower is better. Whiskers reach up to the one-sided 95 % bound, windows of text being "
            "the units and each compared with the dense model's.",
            Measure(Axis("perplexity", False, True), dense, perplexities, up(bounds, perplexities)),
        ),
        (
            "KL divergence",
            "KL(dense ∥ sparse), nats a token, with its 95 % bound. Zero is the dense model.",
            Measure(Axis("KL, nats a token", False), 0.0, kls, up([x.kl_upper for x in rows], kls)),
        ),
        (
            "Agreement",
            "How often both models put the same token first.",
            Measure(
                Axis("same first token", True, unit=" %", limits=(0, 100)),
                100.0,
                [100 * x.top1_agreement for x in rows],
            ),
        ),
    ]
    for task, name, dense_metric in _drawn_metrics(report.tasks, None):
        assert report.tasks is not None
        metrics = [
            one.tasks[task].metrics.get(name) if task in one.tasks else None
            for one in report.tasks.results
        ]
        errors = [100 * ((m and m.difference_stderr) or 0.0) for m in metrics]
        measure = Measure(
            Axis(name.partition(",")[0], dense_metric.higher_is_better, unit=" %", limits=(0, 100)),
            100 * dense_metric.value,
            [None if m is None else 100 * m.value for m in metrics],
            [(error, error) for error in errors],
        )
        note = "Whiskers: one standard error of the difference to dense on the same questions."
        found.append((task, note, measure))
    return found


def _prices(report: Report) -> list[tuple[str, Measure]]:
    rows = report.quality.results
    found = [
        (
            "sparsity",
            Measure(
                Axis("weights not touched", True, unit=" %"), 0.0, [100 * x.sparsity for x in rows]
            ),
        ),
        (
            "bytes",
            Measure(
                Axis("megabytes a token", False),
                rows[0].dense_bytes / 1e6,
                [x.bytes / 1e6 for x in rows],
            ),
        ),
    ]
    if report.speed is not None:
        speeds = [x.tokens_per_second for x in report.speed.results]
        found.append(
            ("speed", Measure(Axis("tokens a second", True), dense_speed(report), list(speeds)))
        )
    return found


def quality_rows(report: Report) -> list[Row]:
    """Return the figures of each quality against each price."""
    chosen = report.recommendation
    labels = [_short(plan.name) for plan in report.plans]
    rows = []
    for title, note, quality in _qualities(report):
        figures = []
        for what, price in _prices(report):
            points = [
                Point(number, x, y, quality.errors[number] if quality.errors else (0.0, 0.0))
                for number, (x, y) in enumerate(zip(price.values, quality.values, strict=True))
                if x is not None and y is not None and math.isfinite(y)
            ]
            if points and quality.dense is not None:
                figures.append(
                    plots.pareto(
                        f"{_slug(title)}-{what}",
                        price.axis,
                        quality.axis,
                        plots.series_of(report.quality, points),
                        labels,
                        (price.dense, quality.dense),
                        chosen.plan,
                    )
                )
        if figures:
            rows.append(Row(title, note, figures))
    return rows


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _short(name: str) -> str:
    """Return a plan's sparsity alone: which method it is, its colour says."""
    return " ".join(name.split(" ")[-2:])


def _legend(report: Report) -> list[tuple[str, int, str]]:
    points = [Point(number, 0.0, 0.0) for number in range(len(report.plans))]
    found = plots.series_of(report.quality, points)
    count = len(plots.SERIES)
    return [
        (one.name, number % count + 1, plots.SHAPES[number % count])
        for number, one in enumerate(found)
    ]


def _maps(report: Report) -> list[Figure]:
    pairs = zip(report.plans, report.quality.results, strict=True)
    found = [
        plots.allocation(f"allocation-{number}", plan.name, row.by_place)
        for number, (plan, row) in enumerate(pairs)
        if row.by_place
    ]
    return [*found, plots.allocation_scale("allocation-scale")] if found else []


def _ridges(report: Report) -> list[Figure]:
    if report.scores is None:
        return []
    kinds = dict.fromkeys(x.kind for x in report.scores.histograms)
    return [plots.ridges(f"scores-{_slug(kind)}", kind, report.scores) for kind in kinds]


def _roofline(report: Report) -> Figure | None:
    if report.operators is None or not report.operators.operators:
        return None
    return plots.rooflines("roofline", report.operators, [plan.name for plan in report.plans])


def table(report: Report) -> dict[str, Any]:
    """Return the table of all plans: its head, the dense row, and a row for each plan."""
    best = dense_speed(report)
    quality = report.quality
    columns: list[tuple[str, str, Callable[[int, SparseResult], str]]] = [
        ("not touched", "0.0 %", lambda _, x: percent(x.sparsity)),
        (
            "MB a token",
            megabytes(quality.results[0].dense_bytes),
            lambda _, x: megabytes(x.bytes),
        ),
    ]
    speed = report.speed
    if speed is not None:
        columns += [
            (
                "tokens/s",
                "—" if best is None else f"{best:.1f}",
                lambda i, _: f"{speed.results[i].tokens_per_second:.1f}",
            ),
            ("speedup", f"1.00 {TIMES}", lambda i, _: f"{speed.results[i].speedup:.2f} {TIMES}"),
        ]
    columns += [
        ("perplexity", f"{quality.dense.perplexity:.3f}", lambda _, x: f"{x.perplexity:.3f}"),
        ("increase", "", lambda _, x: percent(x.increase, sign=True)),
        (
            "at most",
            "",
            lambda _, x: "—" if x.increase_upper is None else percent(x.increase_upper, sign=True),
        ),
        ("KL", "0", lambda _, x: f"{x.kl:.4f}"),
        ("same first", "100 %", lambda _, x: percent(x.top1_agreement)),
    ]
    return {
        "head": [name for name, _, _ in columns],
        "dense": [dense for _, dense, _ in columns],
        "rows": [[cell(i, x) for _, _, cell in columns] for i, x in enumerate(quality.results)],
    }


def _task_rows(tasks: TasksEvaluation | None) -> list[list[str]]:
    """Return a row for each model, task and metric: plan number, task, metric, score, ..."""
    if tasks is None:
        return []
    rows = []
    for number, one in enumerate((tasks.dense, *tasks.results)):
        for task, score in one.tasks.items():
            for name, metric in score.metrics.items():
                error = "" if metric.stderr is None else f" ± {metric.stderr:.4f}"
                against = ""
                if metric.difference is not None and metric.difference_stderr is not None:
                    against = f"{metric.difference:+.4f} ± {metric.difference_stderr:.4f}"
                rows.append(
                    [
                        str(number - 1),
                        f"{task} ({score.count})",
                        name.removesuffix(",none"),
                        "" if one.sparsity is None else percent(one.sparsity),
                        f"{metric.value:.4f}{error}",
                        against.replace("-", MINUS),
                        "" if metric.changed is None else percent(metric.changed),
                    ]
                )
    return rows


def _operator_rows(report: Report) -> list[list[str]]:
    if report.operators is None:
        return []
    roof = report.operators.read_bandwidth_gbps
    rows = []
    for x in report.operators.operators:
        gbps = x.bytes / x.microseconds / 1e3
        rows.append(
            [
                x.kind,
                f"{x.out_features} {TIMES} {x.in_features}",
                "dense" if x.plan is None else report.plans[x.plan].name,
                percent(x.sparsity),
                f"{x.microseconds:.1f}",
                f"{x.operations / x.bytes:.2f}",
                f"{gbps:.1f}",
                percent(gbps / roof, 0),
            ]
        )
    return rows


def _operator_gains(report: Report) -> list[list[str]]:
    """Return what the plan that the page speaks of gains in each operator."""
    if report.operators is None:
        return []
    roof, number = report.operators.read_bandwidth_gbps, shown(report)
    rows = []
    for x in report.operators.operators:
        dense = next(y for y in report.operators.operators if y.kind == x.kind and y.plan is None)
        if x.plan == number:
            rows.append(
                [
                    x.kind,
                    f"{dense.microseconds:.1f}",
                    f"{x.microseconds:.1f}",
                    f"{dense.microseconds / x.microseconds:.2f} {TIMES}",
                    f"{dense.bytes / x.bytes:.2f} {TIMES}",
                    percent(x.bytes / x.microseconds / 1e3 / roof, 0),
                ]
            )
    return rows
