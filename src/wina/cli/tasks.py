"""How scores of tasks are shown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from wina.evaluation.tasks import Metric, TasksEvaluation, TasksResult


def show_tasks(result: TasksEvaluation) -> None:
    """Print a row for each model, task and metric."""
    table = Table("plan", "sparsity", "task", "metric", "score", "against dense", "changed")
    for one in (result.dense, *result.results):
        for task, score in one.tasks.items():
            for name, metric in score.metrics.items():
                table.add_row(
                    plan_name(one),
                    "" if one.sparsity is None else f"{one.sparsity:.1%}",
                    f"{task} ({score.count})",
                    name.removesuffix(",none"),
                    with_error(metric.value, metric.stderr),
                    against(metric),
                    "" if metric.changed is None else f"{metric.changed:.1%}",
                )
        for task, error in one.failures.items():
            table.add_row(plan_name(one), "", task, "failed", error, "", "")
    console = Console()
    console.print(table)
    console.print(
        f"[dim]{result.model}, {result.dtype} on {result.device}; {result.scoring}. ± is one "
        "standard error; against dense: mean of the differences question by question; changed: "
        "questions scored otherwise than by the dense model[/dim]",
        highlight=False,
    )


def plan_name(one: TasksResult) -> str:
    """Return what a row is called."""
    if one.allocation is None:
        return one.method
    return f"{one.method}, {one.allocation}, {one.selection}, {one.target_sparsity:.0%}"


def with_error(value: float, stderr: float | None) -> str:
    """Return a score and its standard error."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def against(metric: Metric) -> str:
    """Return the paired difference and its standard error."""
    if metric.difference is None or metric.difference_stderr is None:
        return ""
    return f"{metric.difference:+.4f} ± {metric.difference_stderr:.4f}"
